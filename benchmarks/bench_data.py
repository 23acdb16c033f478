"""Rates of the data path on real text, against other programs in the same run: JSON, CSV and a table."""

import csv
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.baselines import ENCODERS
from benchmarks.debian_text import PACKAGES, write_corpus
from benchmarks.processes import ROOT, Measured, python, run_measured
from benchmarks.provenance import provenance
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.data.shards import DTYPE_CODES, INDEX_HEADER, open_shards
from metro_megatron.errors import UserError
from metro_megatron.text.debian import fetch_packages
from metro_megatron.tokenizer.tokenizer import Tokenizer

OURS = "ours"
MEGATRON = "Megatron-LM"
_CHUNKS_PER_PROCESS = 8
COLUMNS = (
    *("program", "unit", "processes", "text_mb", "ids", "wall_s", "mb_per_s", "ids_per_s", "ratio", "scaling"),
    *("cpu_s", "mb_per_cpu_s", "ids_per_cpu_s", "cpu_ratio", "max_rss_mb"),
)


@dataclass(frozen=True)
class Inputs:
    """What every program reads."""

    text: Path
    megabytes: float
    """Of text."""
    tiny: Path
    """One document, which shows how long starting takes."""
    tokenizer: Path
    work: Path


@dataclass(frozen=True)
class Options:
    """Of what, how much, how often."""

    output: str
    """Path of the results without ending: .json and .csv are written."""
    text: str = ""
    """JSON Lines, or a folder of text files; Debian's documentation packages are downloaded where none is given."""
    tokenizer: str = ""
    """Tokenizer folder; one of 128,000 ids is trained on the text where none is given."""
    megatron: str = ""
    """A checkout of Megatron-LM, whose tools/preprocess_data.py is measured too."""
    max_bytes: Annotated[int, at_least(1)] = 120_000_000
    """Text that all programs encode, in bytes."""
    processes: list[int] = field(default_factory=list)
    """Numbers of processes for ours; by default 1, 2, 4, ... up to the machine's cores."""
    repeats: Annotated[int, at_least(1)] = 3
    """Rounds of preprocessing."""
    index_samples: Annotated[int, at_least(1)] = 20_000_000
    """Samples of synthetic documents in the sample index; 14 bytes of disk each."""
    work: str = ""
    """Folder for text and shards, which stays; a temporary one by default."""


def main(options: Options) -> None:
    """Measure preprocessing end to end, building the sample index, and loading batches.

    Preprocessing is measured from the start of the program to its end, less the time for a document per process.
    Every program runs in every round; a row is its round of median processor time. Each ratio is that of ids per second
    of ours, for whole documents on one process, to another program's on one process, in this run; the others encode
    whole documents too, and Megatron-LM's ids must be ours, document by document. Run it on a quiet machine.
    """
    megatron, output = options.megatron, options.output
    counts = options.processes or _powers(os.cpu_count() or 1)
    if min(counts) < 1:
        raise UserError("--processes: must be positive")
    if megatron and not (Path(megatron) / "tools" / "preprocess_data.py").is_file():
        raise UserError(f"--megatron {megatron}: no checkout of Megatron-LM, as it lacks tools/preprocess_data.py")
    folder = Path(options.work or tempfile.mkdtemp(prefix="bench_data_")).absolute()
    try:
        inputs = _prepare(folder, options.text, options.tokenizer, options.max_bytes)
        programs = [partial(_ours, inputs, "document", count) for count in counts]
        programs += [partial(_ours, inputs, "line", 1)]
        programs += [partial(_baseline, inputs, name) for name in ENCODERS]
        programs += [partial(_megatron, inputs, Path(megatron).absolute())] if megatron else []
        rows = _medians(programs, options.repeats)
        if megatron:
            check_ids(_prefix(inputs, "document", counts[0]), _megatron_prefix(inputs))
        compare(rows)
        rates = _rates(inputs, options.index_samples)
    finally:
        if not options.work:
            shutil.rmtree(folder, ignore_errors=True)
    run = provenance(torch.device("cpu"), ["python", "-m", "benchmarks.bench_data", *sys.argv[1:]])
    _write(Path(output), {"run": run, "machine": _machine(), "preprocessing": rows, **rates})
    print(_table(rows))
    index, loader = rates["index"], rates["loader"]
    print(
        f"sample index: {index['samples_per_s'] / 1e6:,.2f} M samples/s, {index['samples']:,} samples in "
        f"{index['seconds']:,.0f} s, {index['max_rss_mb']:,.0f} MB of memory"
    )
    print(f"loader: {loader['tokens_per_s'] / 1e6:,.2f} M tokens/s on one core")
    print(f"wrote {output}.json and {output}.csv")


def _medians(programs: Sequence[Callable[[], dict[str, Any]]], rounds: int) -> list[dict[str, Any]]:
    """The round of (lower) median processor time of every program, with the times of all."""
    tries = [[program() for program in programs] for _ in range(rounds)]
    rows = []
    for of_program in zip(*tries, strict=True):
        median = sorted(of_program, key=lambda row: row["cpu_s"])[(rounds - 1) // 2]
        rows.append(median | {f"all_{name}": [row[name] for row in of_program] for name in ("wall_s", "cpu_s")})
    return rows


def _prepare(folder: Path, text: str, tokenizer: str, max_bytes: int) -> Inputs:
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(text) if text else folder / "debian"
    if not text and not source.exists():
        fetch_packages(source, PACKAGES)
    corpus, tiny = folder / "text.jsonl", folder / "tiny.jsonl"
    size = _copy_lines(source, corpus, max_bytes) if source.is_file() else write_corpus(source, corpus, max_bytes)
    if size == 0:
        raise UserError(
            f"--text {source}: neither JSON Lines nor a folder of text files (.txt, .html, .rst, .pod, .md, .dict; .gz)"
        )
    with corpus.open("rb") as file:
        tiny.write_bytes(file.readline())
    if not tokenizer:
        tokenizer = str(folder / "tokenizer")
        options = ("--output", tokenizer, "--sample_bytes", "100000000", "--overwrite")
        run_measured(python(ROOT / "tools" / "train_tokenizer.py", "--input", corpus, *options))
    return Inputs(corpus, size / 1e6, tiny, Path(tokenizer).absolute(), folder)


def _copy_lines(source: Path, target: Path, max_bytes: int) -> int:
    """Copy the first lines of a file of JSON Lines with up to `max_bytes` of text; returns the bytes of text."""
    size = 0
    with source.open("rb") as read, target.open("wb") as written:
        for line in read:
            text_bytes = len(json.loads(line)["text"].encode())
            if size + text_bytes > max_bytes:
                break
            size += text_bytes
            written.write(line)
    return size


def _prefix(inputs: Inputs, unit: str, processes: int) -> Path:
    return inputs.work / f"{OURS}-{unit}-{processes}"


def _ours(inputs: Inputs, unit: str, processes: int) -> dict[str, Any]:
    prefix = _prefix(inputs, unit, processes)

    def run(source: Path, chunks: int) -> Measured:
        chunk_bytes = -(-source.stat().st_size // chunks)
        return run_measured(
            python(
                *(ROOT / "tools" / "preprocess_data.py", "--input", source, "--tokenizer", inputs.tokenizer),
                *("--output_prefix", prefix, "--workers", str(processes), "--overwrite", "--unit", unit),
                *("--chunk_bytes", str(chunk_bytes)),
            )
        )

    start = inputs.work / f"start-{processes}.jsonl"
    start.write_bytes(inputs.tiny.read_bytes() * processes)
    started, whole = run(start, processes), run(inputs.text, _CHUNKS_PER_PROCESS * processes)
    ids = json.loads(Path(f"{prefix}.manifest.json").read_text())["tokens"]
    return {"program": OURS, "unit": unit, "processes": processes, **_figures(inputs, ids, started, whole)}


def _baseline(inputs: Inputs, name: str) -> dict[str, Any]:
    def run(source: Path) -> Measured:
        words = ("-m", "benchmarks.baselines", "--name", name, "--input", source, "--tokenizer", inputs.tokenizer)
        environment = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        return run_measured(python(*words, "--output", inputs.work / f"{name}.bin"), environment=environment)

    started, whole = run(inputs.tiny), run(inputs.text)
    ids = json.loads(whole.output)["tokens"]
    return {"program": name, "unit": "document", "processes": 1, **_figures(inputs, ids, started, whole)}


def _megatron_prefix(inputs: Inputs) -> Path:
    return inputs.work / "megatron_text_document"


def _megatron(inputs: Inputs, checkout: Path) -> dict[str, Any]:
    def run(source: Path) -> Measured:
        command = python(
            *(checkout / "tools" / "preprocess_data.py", "--input", source, "--output-prefix"),
            *(inputs.work / "megatron", "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"),
            *(inputs.tokenizer / "tokenizer.model", "--workers", "1"),
        )
        path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
        return run_measured(command, checkout, {"PYTHONPATH": path})

    started, whole = run(inputs.tiny), run(inputs.text)
    ids = len(_indexed(_megatron_prefix(inputs))[0])
    return {"program": MEGATRON, "unit": "document", "processes": 1, **_figures(inputs, ids, started, whole)}


def _figures(inputs: Inputs, ids: int, started: Measured, whole: Measured) -> dict[str, Any]:
    """Rates of a program; the time for a document per process is taken off."""
    wall, cpu = whole.wall_s - started.wall_s, whole.cpu_s - started.cpu_s
    return {
        "text_mb": round(inputs.megabytes, 3),
        "ids": ids,
        "wall_s": round(wall, 3),
        "start_s": round(started.wall_s, 3),
        "mb_per_s": round(inputs.megabytes / wall, 3),
        "ids_per_s": round(ids / wall),
        "cpu_s": round(cpu, 3),
        "start_cpu_s": round(started.cpu_s, 3),
        "mb_per_cpu_s": round(inputs.megabytes / cpu, 3),
        "ids_per_cpu_s": round(ids / cpu),
        "max_rss_mb": round(whole.max_rss_mb, 1),
    }


def check_ids(ours: Path, theirs: Path) -> None:
    """Raise UserError unless a dataset of whole documents has the ids of an IndexedDataset, document by document."""
    shards = open_shards([str(ours)])
    ids, lengths = (np.concatenate([getattr(one, name) for one in shards]) for name in ("tokens", "unit_lengths"))
    other_ids, other_lengths = _indexed(theirs)
    if len(lengths) != len(other_lengths):
        raise UserError(f"{ours} has {len(lengths):,} documents, {theirs} {len(other_lengths):,}")
    is_equal = lengths == other_lengths
    if is_equal.all():
        is_equal = np.logical_and.reduceat(ids == other_ids, np.cumsum(lengths) - lengths)
    if not is_equal.all():
        raise UserError(f"ids of document {np.flatnonzero(~is_equal)[0]:,} differ in {ours} and {theirs}")


def _indexed(prefix: Path) -> tuple[NDArray[np.integer], NDArray[np.int32]]:
    """Ids, and how many every sequence has, of megatron-core's IndexedDataset."""
    index = prefix.with_name(f"{prefix.name}.idx")
    _, _, code, sequences, _ = INDEX_HEADER.unpack(index.read_bytes()[: INDEX_HEADER.size])
    dtype = next(name for name, number in DTYPE_CODES.items() if number == code)
    lengths = np.fromfile(index, np.int32, sequences, offset=INDEX_HEADER.size)
    return np.fromfile(prefix.with_name(f"{prefix.name}.bin"), dtype), lengths


def compare(rows: list[dict[str, Any]]) -> None:
    """Add how many times the ids per second of a row ours makes on one process, by the clock and by processor time.

    Rows of ours have `scaling` instead: their rate to as many times that of one process.
    """
    single = {row["unit"]: row for row in rows if row["program"] == OURS and row["processes"] == 1}
    for row in rows:
        base = single.get(row["unit"])
        if base and row["program"] == OURS:
            row["scaling"] = round(row["ids_per_s"] / base["ids_per_s"] / row["processes"], 3)
        elif base:
            row["ratio"] = round(base["ids_per_s"] / row["ids_per_s"], 2)
            row["cpu_ratio"] = round(base["ids_per_cpu_s"] / row["ids_per_cpu_s"], 2)


def _rates(inputs: Inputs, index_samples: int) -> dict[str, Any]:
    from benchmarks.loading import loader_rate

    words = ("-m", "benchmarks.loading", "--samples", str(index_samples), "--folder", inputs.work / "index")
    built = run_measured(python(*words))
    index = json.loads(built.output) | {"max_rss_mb": round(built.max_rss_mb, 1)}
    prefix = next(inputs.work.glob(f"{OURS}-line-*.manifest.json")).name.removesuffix(".manifest.json")
    vocab_size = Tokenizer.from_folder(inputs.tokenizer).vocab_size
    return {"index": index, "loader": loader_rate(str(inputs.work / prefix), vocab_size)}


def _powers(limit: int) -> list[int]:
    return sorted({min(1 << k, limit) for k in range(limit.bit_length() + 1)})


def _machine() -> dict[str, Any]:
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    packages = ("gigatoken", "sentencepiece", "tokenizers", "numpy", "orjson")
    return {
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def _write(output: Path, result: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_name(output.name + ".json").write_text(json.dumps(result, indent=2) + "\n")
    with output.with_name(output.name + ".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(result["preprocessing"])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [[str(row.get(column, "")) for column in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
    return "\n".join("  ".join(f"{x:>{w}}" for x, w in zip(x, widths, strict=True)) for x in [list(COLUMNS), *lines])


if __name__ == "__main__":
    run_tool(main)
