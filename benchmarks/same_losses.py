"""Whether a device trains as the CPU does: losses of 200 steps of the demo's model beside those that the CPU had.

The text is a language of hashes, so that no file is needed and no library's random numbers matter: half of its tokens
follow from the token before, the others are drawn by a law like Zipf's. Dropout is on, since its masks are the same
everywhere.
"""

from __future__ import annotations

import csv
import io
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from benchmarks.provenance import ROOT, provenance
from benchmarks.results import Results, Row
from benchmarks.synthetic_shards import write_dataset
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.config.file import load_config
from metro_megatron.config.schema import Config
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.errors import UserError
from metro_megatron.files import replace_text
from metro_megatron.randomness import hash64
from metro_megatron.train.launch import Device, import_megatron
from metro_megatron.vocabulary import NUM_SPECIALS

Precision = Literal["fp32", "bf16"]
Losses = dict[str, float]
LOSSES = ("aux_loss", "rtd_loss", "clm_loss")
REFERENCE = Path(__file__).parent / "reference_losses.csv"
STEPS = 200
DOCUMENTS, LONGEST = 4096, 80
EARLY = 20
TOLERANCE: dict[str, tuple[float, float]] = {"fp32": (1e-4, 1e-4), "bf16": (0.05, 2e-3)}
"""By precision, largest |loss / reference - 1| of the first EARLY steps, and of means over EARLY steps ever after.

On the CPU, in FP32: two threads in place of one are off by 1e-7 and 2e-8, attention that is 1e-6 too large by 3e-7 and
5e-8, other dropout masks in attention by 8e-3 and 1e-3. bf16 is off by 2e-2 and 3e-4."""


@dataclass(frozen=True)
class Options:
    """Where, how long, in which precisions."""

    device: Device = "cuda"
    """What trains."""
    precisions: list[Precision] = field(default_factory=lambda: ["fp32", "bf16"])
    """Each trains a run of its own; all are compared with the CPU's in FP32."""
    steps: Annotated[int, at_least(1)] = STEPS
    """At most as many as the reference has."""
    output: str = ""
    """Results without ending."""
    commit: str = ""
    """Commit to note where the copy has no git."""
    record: bool = False
    """Write the reference instead, on the CPU in FP32."""


def main(options: Options) -> int:
    """Train the demo's model for 200 steps on a language of hashes and compare its losses with the CPU's.

    Exit codes: 0 all within the tolerance, 1 not so, 2 nothing could be compared, with the reason.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU: run this on a machine with one, or try it out with --device cpu")
    command = ["python", "-m", "benchmarks.same_losses", *sys.argv[1:]]
    head = provenance(torch.device(options.device), command, options.commit)
    if options.record:
        losses = train("fp32", "cpu", options.steps)
        write_reference(REFERENCE, losses, f"commit {head['commit']}, torch {head['torch']}")
        return 0
    wanted = read_reference(REFERENCE)
    if options.steps > len(wanted):
        raise UserError(f"--steps is {options.steps}, must be at most {len(wanted)}, the steps of {REFERENCE.name}")
    results = Results(Path(options.output) if options.output else None, head, ("precision", "step", *LOSSES))
    verdicts = []
    for precision in options.precisions:
        got = train(precision, options.device, options.steps)
        results.rows += [{"precision": precision, "step": step, **one} for step, one in enumerate(got, 1)]
        verdicts += compare(precision, got, wanted)
        results.note(verdicts=verdicts)
    print(*(one["text"] for one in verdicts), sep="\n")
    return int(not all(one["is_equal"] for one in verdicts))


def train(precision: Precision, device: Device, steps: int) -> list[Losses]:
    """The losses of each step, on documents in a folder that is dropped."""
    with tempfile.TemporaryDirectory(prefix="same_losses_") as folder:
        config = losses_config(Path(folder), precision, device)
        write_dataset(Path(config.data.train[0]), hashed_documents(config.model.vocab_size), config.model.vocab_size)
        return [{name: figures[name] for name in LOSSES} for _, figures in trained(config, device, steps)]


def trained(
    config: Config, device: Device, steps: int, every: int = 1
) -> Generator[tuple[int, dict[str, float]], None, None]:
    """Train, and yield the tokens and the figures of each so many steps, whose end the host waits for."""
    import_megatron()
    from metro_megatron.train.corpus import Corpus
    from metro_megatron.train.metrics import MetricSums
    from metro_megatron.train.trainer import Trainer

    trainer, tokens = Trainer(config, Corpus.open(config), torch.device(device)), 0
    metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
    try:
        with closing(trainer.corpus.training_data(trainer.layout).prefetch(0, steps, 0)) as batches:
            for step, batch in enumerate(batches, 1):
                trainer.step.train(batch, metrics)
                tokens += batch.num_tokens
                if step % every == 0 or step == steps:
                    yield tokens, metrics.reduce()
                    tokens = 0
    finally:
        trainer.close()


def losses_config(folder: Path, precision: Precision, device: Device) -> Config:
    """The demo's model, on one process, with dropout and a rate that soon rises."""
    config = load_config(ROOT / "examples" / "demo.yaml")
    data = replace(config.data, train=[str(folder / "text")], validation=[], micro_batch_tokens=1024)
    return replace(
        config,
        model=replace(config.model, vocab_size=4096, hidden_dropout=0.1, attention_dropout=0.1),
        data=data,
        optimizer=replace(config.optimizer, lr_warmup_steps=STEPS // 10),
        train=replace(config.train, output=str(folder / "run"), device=device, precision=precision, train_steps=STEPS),
    )


def hashed_documents(vocab_size: int, count: int = DOCUMENTS) -> TokenizedDocuments:
    """Documents of 20 to LONGEST tokens, made of integers alone, so that they are the same on every machine."""
    document, place = np.arange(count)[:, None], np.arange(LONGEST)
    noise = hash64(1, document, place)  # [D, L]
    # Ids 2^k to 2^(k+1) together have the same share for every k below the number of bits.
    bits = vocab_size.bit_length() - 1
    first = np.uint64(1) << noise % np.uint64(bits)
    drawn = (first + (noise >> np.uint64(8)) % first).astype(np.int64)
    words = np.int64(vocab_size - NUM_SPECIALS)
    tokens = drawn % words
    for t in range(1, LONGEST):
        follows = (5 * tokens[:, t - 1] + 7) % words
        tokens[:, t] = np.where(noise[:, t] >> np.uint64(63) == 1, follows, tokens[:, t])
    lengths = 20 + (hash64(2, np.arange(count)) % np.uint64(LONGEST - 19)).astype(np.int32)
    ids = (tokens + NUM_SPECIALS)[place < lengths[:, None]]
    return TokenizedDocuments(ids, lengths, np.arange(count + 1))


def compare(precision: Precision, got: Sequence[Losses], wanted: Sequence[Losses]) -> list[Row]:
    """A verdict on each loss: its first EARLY steps one by one, then means over EARLY steps."""
    early, later = TOLERANCE[precision]
    found = []
    for name in LOSSES:
        pairs = np.array([(one[name], other[name]) for one, other in zip(got, wanted, strict=False)])
        whole = len(pairs) // EARLY * EARLY
        means = pairs[EARLY:whole].reshape(-1, EARLY, 2).mean(1)
        off = [float(np.abs(x[:, 0] / x[:, 1] - 1).max(initial=0.0)) for x in (pairs[:EARLY], means)]
        is_equal = bool(np.isfinite(pairs).all() and off[0] <= early and off[1] <= later)
        text = (
            f"{precision} {name}: {'equal' if is_equal else 'NOT EQUAL'}, off by {off[0]:.1e} in the first {EARLY} "
            f"steps (at most {early:g}), by {off[1]:.1e} in means of {EARLY} after (at most {later:g})"
        )
        found.append({"precision": precision, "loss": name, "is_equal": is_equal, "text": text})
    return found


def write_reference(path: Path, losses: Sequence[Losses], made_by: str) -> None:
    content = io.StringIO(newline="")
    content.write(f"# {made_by}\n")
    writer = csv.DictWriter(content, ("step", *LOSSES), lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": step, **{k: f"{x:.8g}" for k, x in one.items()}} for step, one in enumerate(losses, 1))
    replace_text(path, content.getvalue())


def read_reference(path: Path) -> list[Losses]:
    lines = path.read_text().splitlines()[1:]
    return [{name: float(row[name]) for name in LOSSES} for row in csv.DictReader(lines)]


if __name__ == "__main__":
    run_tool(main)
