"""From the start of a rank's process to the end of its first step, beside importing torch and megatron-core alone."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from benchmarks.bench_cpu import CPU
from benchmarks.processes import ROOT, Measured, python, run_measured
from benchmarks.provenance import provenance
from benchmarks.results import Results, Row, table
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.preprocess.run import PreprocessOptions, preprocess
from metro_megatron.tokenizer.training import train_tokenizer

IDS = 512
"""As many as such little text teaches."""
COLUMNS = ("what", "seconds", "cpu_seconds", "ratio", "lower_quartile", "upper_quartile", "cpu_ratio", "rounds")
ALONE = "import torch; import megatron.core"
RANK = """
import json, os, sys, time
parts = {}

def timed(owner, name, part, is_last=False):
    inner = getattr(owner, name)
    def outer(*arguments, **options):
        begin, used = time.monotonic(), time.process_time()
        value = inner(*arguments, **options)
        before = parts.get(part, (0.0, 0.0))
        parts[part] = (before[0] + time.monotonic() - begin, before[1] + time.process_time() - used)
        if is_last:
            print("\\n" + json.dumps(parts), flush=True)
            os._exit(0)
        return value
    setattr(owner, name, outer)

def modules():
    from metro_megatron.checkpoint import save
    from metro_megatron.train import corpus, step, trainer
    timed(corpus.Corpus, "open", "data")
    timed(trainer.Trainer, "__init__", "models")
    timed(save.Checkpoints, "check_folder", "folder")
    timed(trainer.Trainer, "_check", "self-check")
    timed(step.Step, "train", "first step", is_last=True)

from metro_megatron.train import launch
timed(launch, "parse_config", "options")
timed(launch, "import_megatron", "megatron-core")
timed(sys.modules[__name__], "modules", "modules")
megatron = launch.import_megatron
launch.import_megatron = lambda: (megatron(), modules())
launch.pretrain(sys.argv[1:])
"""
"""A run up to its first step, whose parts say what they took; imports where a run has them."""
PARTS = ("options", "megatron-core", "modules", "data", "models", "folder", "self-check", "first step")


@dataclass(frozen=True)
class Options:
    """How often, where to."""

    rounds: Annotated[int, at_least(1)] = 7
    """Of both."""
    output: str = ""
    """Results without ending, such as docs/benchmarks/start; none are written by default."""


def main(options: Options) -> None:
    """From the start of a rank's process to the end of its first step, beside importing torch and megatron-core alone.

    One process of the demo's model on the CPU, a new run each time; both in turn. A ratio is to the imports of the same
    round. options: files and command line. megatron-core: its import. modules: this program's, and what else
    they import. data: shards and sample index. models: the process group, both models, the optimizer. folder: a save
    that is tried. rest: the interpreter, torch, and what lies between.
    """
    output = Path(options.output) if options.output else None
    head = provenance(CPU, ["python", "-m", "benchmarks.bench_start", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="bench_start_") as folder:
        shards = _shards(Path(folder))
        rounds = [_round(shards, Path(folder) / str(number)) for number in range(1 + options.rounds)]
    results = Results(output, head, COLUMNS)
    for row in rows(rounds[1:]):  # the first warms up
        results.add(row)
    print(table(results.rows, COLUMNS))
    print(f"wrote {output}.json and {output}.csv" if output else "nothing was written (--output)")


Times = tuple[float, float]
"""Seconds by the clock, and of processor time."""


def _shards(folder: Path) -> Path:
    """Prefix of this project's pages, with a tokenizer of their own."""
    source, tokenizer, shards = folder / "text.jsonl", folder / "tokenizer", folder / "shards"
    texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    train_tokenizer([text.splitlines() for text in texts], IDS, tokenizer)
    preprocess(PreprocessOptions([str(source)], str(tokenizer), str(shards), workers=1))
    return shards


def _round(shards: Path, run: Path) -> dict[str, Times]:
    options = ("--config", ROOT / "examples" / "demo.yaml", "--data.train", shards)
    threads = {"OMP_NUM_THREADS": "1"}
    alone = run_measured(python("-W", "ignore", "-c", ALONE), environment=threads)
    rank = run_measured(python("-W", "ignore", "-c", RANK, *options, "--train.output", run), environment=threads)
    parts = json.loads(rank.output.splitlines()[-1])
    return {"libraries": _times(alone), "rank": _times(rank), **{part: tuple(parts[part]) for part in PARTS}}


def _times(measured: Measured) -> Times:
    return measured.wall_s, measured.cpu_s


def rows(rounds: list[dict[str, Times]]) -> Iterator[Row]:
    """Of the imports, the rank, its parts, and what is left of it."""
    rounds = [{**one, "rest": _rest(one)} for one in rounds]
    for what in rounds[0]:
        ratios, cpu_ratios = ([one[what][kind] / one["libraries"][kind] for one in rounds] for kind in (0, 1))
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        seconds, cpu_seconds = (statistics.median(one[what][kind] for one in rounds) for kind in (0, 1))
        row = (what, seconds, cpu_seconds, median, low, high, statistics.median(cpu_ratios), len(rounds))
        yield dict(zip(COLUMNS, row, strict=True))


def _rest(one: dict[str, Times]) -> Times:
    wall, used = (one["rank"][kind] - sum(one[part][kind] for part in PARTS) for kind in (0, 1))
    return wall, used


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_tool(main)
