"""Rates of the data path on real text, against other programs in the same run: JSON, CSV and a table."""

import csv
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from benchmarks.baselines import ENCODERS
from benchmarks.debian_text import fetch_packages, write_corpus
from benchmarks.processes import ROOT, Measured, python, run_measured
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.errors import UserError
from metro_megatron.tokenizer.tokenizer import Tokenizer

OURS = "ours"
_CHUNKS_PER_PROCESS = 8
COLUMNS = ("program", "processes", "text_mb", "wall_s", "mb_per_s", "cpu_s", "max_rss_mb", "tokens", "ratio", "scaling")


@dataclass(frozen=True)
class Inputs:
    """What every program reads."""

    large: Path
    small: Path
    """The beginning of `large`, for the slow programs."""
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
    """Folder of text files; Debian's documentation packages are downloaded where none is given."""
    tokenizer: str = ""
    """Tokenizer folder; one of 128,000 ids is trained on the text where none is given."""
    megatron: str = ""
    """A checkout of Megatron-LM, whose tools/preprocess_data.py is measured too."""
    max_bytes: Annotated[int, at_least(1)] = 120_000_000
    """Text that ours encodes, in bytes."""
    small_bytes: Annotated[int, at_least(1)] = 120_000_000
    """Text that the slower programs encode, in bytes; less is another mix of texts, so compare with care."""
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
    Every program runs in every round; a row is its round of median time. Each ratio is ours on one process to another
    program on one process, in this run. Run it on a quiet machine.
    """
    megatron, output = options.megatron, options.output
    counts = options.processes or _powers(os.cpu_count() or 1)
    if min(counts) < 1:
        raise UserError("--processes: must be positive")
    if megatron and not (Path(megatron) / "tools" / "preprocess_data.py").is_file():
        raise UserError(f"--megatron {megatron}: no checkout of Megatron-LM, as it lacks tools/preprocess_data.py")
    folder = Path(options.work or tempfile.mkdtemp(prefix="bench_data_")).absolute()
    try:
        inputs = _prepare(folder, options.text, options.tokenizer, (options.max_bytes, options.small_bytes))
        programs = [partial(_ours, inputs, count) for count in counts]
        programs += [partial(_baseline, inputs, name) for name in ENCODERS]
        programs += [partial(_megatron, inputs, Path(megatron).absolute())] if megatron else []
        rows = _medians(programs, options.repeats)
        _compare(rows)
        rates = _rates(inputs, options.index_samples)
    finally:
        if not options.work:
            shutil.rmtree(folder, ignore_errors=True)
    _write(Path(output), {"machine": _machine(), "preprocessing": rows, **rates})
    print(_table(rows))
    index, loader = rates["index"], rates["loader"]
    print(
        f"sample index: {index['samples_per_s'] / 1e6:,.2f} M samples/s, {index['samples']:,} samples in "
        f"{index['seconds']:,.0f} s, {index['max_rss_mb']:,.0f} MB of memory"
    )
    print(f"loader: {loader['tokens_per_s'] / 1e6:,.2f} M tokens/s on one core")
    print(f"wrote {output}.json and {output}.csv")


def _medians(programs: Sequence[Callable[[], dict[str, Any]]], rounds: int) -> list[dict[str, Any]]:
    """The round of (lower) median wall time of every program, with the times of all."""
    tries = [[program() for program in programs] for _ in range(rounds)]
    rows = []
    for of_program in zip(*tries, strict=True):
        ordered = sorted(of_program, key=lambda row: row["wall_s"])
        rows.append(ordered[(rounds - 1) // 2] | {"all_wall_s": [row["wall_s"] for row in of_program]})
    return rows


def _prepare(folder: Path, text: str, tokenizer: str, sizes: tuple[int, int]) -> Inputs:
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(text) if text else folder / "debian"
    if not text and not source.exists():
        fetch_packages(source)
    names = [folder / f"{name}.jsonl" for name in ("large", "small", "tiny")]
    if write_corpus(source, names[0], sizes[0]) == 0:
        raise UserError(f"--text {source}: no text files below it (.txt, .html, .rst, .pod, .md, .dict; .gz)")
    write_corpus(source, names[1], min(sizes))
    with names[0].open("rb") as file:
        names[2].write_bytes(file.readline())
    if not tokenizer:
        tokenizer = str(folder / "tokenizer")
        options = ("--output", tokenizer, "--sample_bytes", "100000000", "--overwrite")
        run_measured(python(ROOT / "tools" / "train_tokenizer.py", "--input", names[0], *options))
    return Inputs(names[0], names[1], names[2], Path(tokenizer).absolute(), folder)


def _ours(inputs: Inputs, processes: int) -> dict[str, Any]:
    prefix = inputs.work / f"ours-{processes}"

    def run(source: Path, chunks: int) -> Measured:
        chunk_bytes = -(-source.stat().st_size // chunks)
        return run_measured(
            python(
                *(ROOT / "tools" / "preprocess_data.py", "--input", source, "--tokenizer", inputs.tokenizer),
                *("--output_prefix", prefix, "--workers", str(processes), "--overwrite"),
                *("--chunk_bytes", str(chunk_bytes)),
            )
        )

    start = inputs.work / f"start-{processes}.jsonl"
    start.write_bytes(inputs.tiny.read_bytes() * processes)
    row = _row(OURS, processes, inputs.large, run(start, processes), run(inputs.large, _CHUNKS_PER_PROCESS * processes))
    return row | {"tokens": json.loads(Path(f"{prefix}.manifest.json").read_text())["tokens"]}


def _baseline(inputs: Inputs, name: str) -> dict[str, Any]:
    def run(source: Path) -> Measured:
        words = ("-m", "benchmarks.baselines", "--name", name, "--input", source, "--tokenizer", inputs.tokenizer)
        environment = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        return run_measured(python(*words, "--output", inputs.work / f"{name}.bin"), environment=environment)

    measured = run(inputs.small)
    return _row(name, 1, inputs.small, run(inputs.tiny), measured) | {"tokens": json.loads(measured.output)["tokens"]}


def _megatron(inputs: Inputs, checkout: Path) -> dict[str, Any]:
    def run(source: Path) -> Measured:
        command = python(
            *(checkout / "tools" / "preprocess_data.py", "--input", source, "--output-prefix"),
            *(inputs.work / "megatron", "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"),
            *(inputs.tokenizer / "tokenizer.model", "--append-eod", "--workers", "1"),
        )
        return run_measured(command, checkout, {"PYTHONPATH": str(checkout)})

    return _row("Megatron-LM", 1, inputs.small, run(inputs.tiny), run(inputs.small))


def _row(program: str, processes: int, source: Path, start: Measured, whole: Measured) -> dict[str, Any]:
    """A line of results; the time for a document per process is taken off."""
    with source.open("rb") as file:
        megabytes = sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6
    wall = whole.wall_s - start.wall_s
    return {
        "program": program,
        "processes": processes,
        "text_mb": round(megabytes, 3),
        "wall_s": round(wall, 3),
        "start_s": round(start.wall_s, 3),
        "mb_per_s": round(megabytes / max(wall, 1e-9), 3),
        "cpu_s": round(whole.cpu_s - start.cpu_s, 3),
        "max_rss_mb": round(whole.max_rss_mb, 1),
    }


def _compare(rows: list[dict[str, Any]]) -> None:
    """Add `ratio`, ours of one process to the row, and `scaling`, a row of ours to as many times one process."""
    single = [row for row in rows if row["program"] == OURS and row["processes"] == 1]
    for row in rows if single else ():
        if row["program"] == OURS:
            row["scaling"] = round(row["mb_per_s"] / single[0]["mb_per_s"] / row["processes"], 3)
        else:
            row["ratio"] = round(single[0]["mb_per_s"] / row["mb_per_s"], 2)


def _rates(inputs: Inputs, index_samples: int) -> dict[str, Any]:
    from benchmarks.loading import loader_rate

    words = ("-m", "benchmarks.loading", "--samples", str(index_samples), "--folder", inputs.work / "index")
    built = run_measured(python(*words))
    index = json.loads(built.output) | {"max_rss_mb": round(built.max_rss_mb, 1)}
    prefix = next(inputs.work.glob("ours-*.manifest.json")).name.removesuffix(".manifest.json")
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
