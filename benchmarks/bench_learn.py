"""Whether METRO and masked language modeling learn on a device, and how fast, in a minute on a language of hashes.

`make learn` is the experiment, on text that it fetches and with tasks. This trains two of its arms at its size for one
GPU where there is neither text nor time. Text is read at most once, so that a row's figures are of text that is new.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from benchmarks.provenance import ROOT, provenance
from benchmarks.results import Results, Row, table
from benchmarks.same_losses import hashed_documents, trained
from benchmarks.synthetic_shards import write_dataset
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.train.launch import Device

ARMS = {"metro": ("aux_loss", "clm_loss"), "mlm_15": ("mlm_loss",)}
"""Of examples/campaign, and losses that must fall. Detection's need not: its task becomes harder."""
FIGURES = ("aux_loss", "rtd_loss", "rtd_auc", "clm_loss", "mlm_loss", "mlm_accuracy")
COLUMNS = ("arm", "step", "seconds", "tokens_per_s", *FIGURES)
DOCUMENTS = {"cuda": 100_000, "cpu": 2_000}
"""Of about 50 tokens. A step of the GPU's size has 8,000 at most."""


@dataclass(frozen=True)
class Options:
    """Where, how long."""

    device: Device = "cuda"
    """cpu: a trial at the campaign's size for the CPU."""
    steps: Annotated[int, at_least(2)] = 600
    """Of each arm; a warm-up of a 16th of them."""
    every: Annotated[int, at_least(1)] = 25
    """Steps of a row."""
    budget_s: float = 60.0
    """Seconds for all arms, of which each ends early at its share."""
    output: str = ""
    """Results without ending."""
    commit: str = ""
    """Commit to note where the copy has no git."""


def main(options: Options) -> int:
    """Pretrain METRO and masked language modeling on a language of hashes for about a minute.

    Exit codes: 0 the losses fell, 1 one did not, 2 nothing could be trained, with the reason.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU: run this on a machine with one, or try it out with --device cpu")
    if options.steps < 2 * options.every:
        raise UserError(f"--steps is {options.steps}, must be at least twice --every ({options.every}): two rows")
    command = ["python", "-m", "benchmarks.bench_learn", *sys.argv[1:]]
    head = provenance(torch.device(options.device), command, options.commit)
    results = Results(Path(options.output) if options.output else None, head, COLUMNS)
    started, verdicts = time.monotonic(), []
    for number, arm in enumerate(ARMS, 1):
        rows = learn(arm, options, results, started + options.budget_s * number / len(ARMS))
        verdicts += [verdict(arm, loss, rows) for loss in ARMS[arm]]
        results.note(verdicts=verdicts)
    print(table(results.rows, COLUMNS), *(one["text"] for one in verdicts), sep="\n")
    return int(not all(one["has_fallen"] for one in verdicts))


def learn(arm: str, options: Options, results: Results, deadline: float) -> list[Row]:
    """A row for each so many steps of one arm, added to the results; ends at the deadline, but not before two rows."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench_learn_") as name:
        config = arm_config(arm, options, Path(name))
        count, vocab_size = DOCUMENTS[options.device], config.model.vocab_size
        write_dataset(Path(config.data.train[0]), hashed_documents(vocab_size, count), vocab_size)
        with closing(trained(config, options.device, options.steps, options.every)) as parts:
            last = time.monotonic()
            for tokens, figures in parts:
                now = time.monotonic()
                row = {"arm": arm, "step": min((len(rows) + 1) * options.every, options.steps), "seconds": now - last}
                row |= {"tokens_per_s": tokens / (now - last)}
                rows.append(row | {name: figures[name] for name in FIGURES if name in figures})
                results.add(rows[-1])
                last = now
                if now > deadline and len(rows) > 1:
                    break
    return rows


def arm_config(arm: str, options: Options, folder: Path) -> Config:
    """The campaign's, of one process, whose schedules end with the run."""
    names = ["common", *(["gpu"] if options.device == "cuda" else []), arm]
    config = parse_config(["--config", *(str(ROOT / "examples" / "campaign" / f"{name}.yaml") for name in names)])
    train = replace(config.train, output=str(folder / "run"), train_steps=options.steps)
    return replace(
        config,
        data=replace(config.data, train=[str(folder / "text")], validation=[]),
        optimizer=replace(config.optimizer, lr_warmup_steps=options.steps // 16),
        train=train,
    )


def verdict(arm: str, loss: str, rows: list[Row]) -> Row:
    """Whether a loss is lower at the end than at the beginning."""
    first, last = rows[0][loss], rows[-1][loss]
    has_fallen = math.isfinite(last) and last < first
    speed = max(row["tokens_per_s"] for row in rows)
    text = (
        f"{arm} {loss}: {first:.3f} -> {last:.3f} by step {rows[-1]['step']}{'' if has_fallen else ', NOT FALLEN'}; "
        f"{speed:,.0f} tokens/s at best"
    )
    return {"arm": arm, "loss": loss, "has_fallen": has_fallen, "text": text}


if __name__ == "__main__":
    run_tool(main)
