"""The stages of the demonstration, each as the commands that anyone could type."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metro_megatron.config.file import load_config
from tools.demo.clock import Stage
from tools.demo.journal import Step
from tools.demo.texts import TEXT_FILES, installed_table

SEEDS = (1, 2, 3)
STARTS = ("pretrained", "random")
"""Fine-tuning starts from the pretrained weights, or from random ones of the same architecture."""


@dataclass(frozen=True)
class Preset:
    """One size of the demonstration."""

    config: Path
    """YAML of the pretraining run, relative to the repository."""
    processes: int
    """Of torchrun; the machine has as many cores or GPUs."""
    pretraining_options: tuple[str, ...]
    """What differs from the YAML."""
    epochs: int
    """Of every fine-tuning run."""
    learning_rate: float
    """Of every fine-tuning run."""
    expected_seconds: tuple[float, ...]
    """Of each stage, in order, for the estimate of the time left."""


def preset(name: Literal["demo", "learn"], num_gpus: int, num_cores: int) -> Preset:
    """demo: two cores, minutes. learn: one GPU, about ten minutes, or all cores for a night."""
    if name == "demo":
        return Preset(
            config=Path("examples/demo.yaml"),
            processes=2,
            pretraining_options=(),
            epochs=2,
            learning_rate=5e-4,
            expected_seconds=(8, 12, 10, 400, 15, 15, 150, 5),
        )
    config = Path("examples/learn.yaml")
    if num_gpus:
        seconds = (8, 15, 10, 600, 20, 15, 120, 5)
        return Preset(config, 1, (), epochs=4, learning_rate=2e-4, expected_seconds=seconds)
    return Preset(
        config,
        processes=num_cores,
        # Short rows, so that there are enough of them for every core.
        pretraining_options=("--data.micro_batch_tokens", "1024"),
        epochs=4,
        learning_rate=2e-4,
        expected_seconds=(8, 15, 10, 8 * 3600, 20, 60, 3600, 5),
    )


def build_stages(chosen: Preset, output: Path, repository: Path) -> list[Stage]:
    """The eight stages with results under `output`; commands run in `repository`.

    Raises UserError if the preset's YAML is not readable or the package of the texts is not installed.
    """
    path = _Paths(output, Path(_python(repository)), chosen.config)
    vocab_size = load_config(repository / chosen.config).model.vocab_size
    stages = [
        ("texts", "text of the reviews and sentences", _texts(path)),
        ("tokenizer", "tokenizer", _tokenizer(path, vocab_size)),
        ("shards", "shards of token ids", _shards(path)),
        ("pretraining", "pretraining", _pretraining(path, chosen)),
        ("export", "Hugging Face model", _export(path)),
        ("evaluation", "evaluation on held-out reviews", _evaluation(path)),
        ("finetuning", "fine-tuning and comparison", _finetuning(path, chosen)),
        ("summary", "summary", _summary(path)),
    ]
    num_at_a_time = {"finetuning": 2}
    num_threads = {"evaluation": chosen.processes, "finetuning": max(1, chosen.processes // 2)}
    return [
        Stage(name, title, steps, seconds, num_at_a_time.get(name, 1), num_threads.get(name, 1))
        for (name, title, steps), seconds in zip(stages, chosen.expected_seconds, strict=True)
    ]


@dataclass(frozen=True)
class _Paths:
    """Where everything lies, as the commands name it."""

    output: Path
    python: Path
    config: Path

    def tool(self, name: str) -> tuple[str, ...]:
        return str(self.python), f"tools/{name}.py"

    def module(self, name: str) -> tuple[str, ...]:
        return str(self.python), "-m", f"metro_megatron.demo.{name}"

    def text(self, name: str) -> Path:
        return self.output / "text" / name

    @property
    def tokenizer(self) -> Path:
        return self.output / "tokenizer"

    def shard(self, name: str) -> Path:
        return self.output / "shards" / name

    def manifest(self, name: str) -> Path:
        return self.shard(f"{name}.manifest.json")

    @property
    def run(self) -> Path:
        return self.output / "pretraining"

    @property
    def model(self) -> Path:
        return self.output / "model"

    @property
    def evaluation(self) -> Path:
        return self.output / "evaluation.json"

    @property
    def baseline(self) -> Path:
        return self.output / "baseline.json"

    def classifier(self, start: str, seed: int) -> Path:
        return self.output / "finetuning" / f"{start}-{seed}"


def _texts(path: _Paths) -> tuple[Step, ...]:
    folder = path.text("")
    outputs = tuple(path.text(name) for name in TEXT_FILES)
    return (Step("texts", (*path.module("texts"), "--output", str(folder)), (installed_table(),), outputs),)


def _tokenizer(path: _Paths, vocab_size: int) -> tuple[Step, ...]:
    reviews = path.text("reviews.jsonl")
    options = ("--input", str(reviews), "--vocab_size", str(vocab_size), "--output", str(path.tokenizer))
    return (Step("tokenizer", (*path.tool("train_tokenizer"), *options), (reviews,), (path.tokenizer,)),)


def _shards(path: _Paths) -> tuple[Step, ...]:
    steps = []
    for name in ("reviews", "held_out"):
        text, prefix = path.text(f"{name}.jsonl"), str(path.shard(name))
        options = ("--input", str(text), "--tokenizer", str(path.tokenizer), "--output_prefix", prefix)
        command = (*path.tool("preprocess_data"), *options, "--workers", "2")
        outputs = tuple(
            Path(f"{prefix}{ending}") for ending in ("_00000.bin", "_00000.idx", ".manifest.json", ".tokenizer")
        )
        steps.append(Step(f"shards-{name}", command, (text, path.tokenizer), outputs))
    return tuple(steps)


def _pretraining(path: _Paths, chosen: Preset) -> tuple[Step, ...]:
    command = (
        str(path.python.with_name("torchrun")),
        "--standalone",
        "--nproc-per-node",
        str(chosen.processes),
        "--shutdown-timeout",
        "100",
        "pretrain_metro.py",
        "--config",
        str(path.config),
        "--data.train",
        str(path.shard("reviews")),
        "--data.validation",
        str(path.shard("held_out")),
        "--train.output",
        str(path.run),
        *chosen.pretraining_options,
    )
    inputs = (path.config, path.manifest("reviews"), path.manifest("held_out"))
    return (Step("pretraining", command, inputs, (path.run,), resumes=True),)


def _export(path: _Paths) -> tuple[Step, ...]:
    options = ("--load", str(path.run), "--output", str(path.model))
    names = ("metrics.jsonl", "run_config.yaml", "latest_checkpointed_iteration.txt")
    inputs = tuple(path.run / name for name in names)
    return (Step("export", (*path.tool("convert_checkpoint"), *options), inputs, (path.model,)),)


def _evaluation(path: _Paths) -> tuple[Step, ...]:
    held_out = path.text("held_out.jsonl")
    command = (
        *path.tool("evaluate"),
        "--model",
        str(path.model),
        "--input",
        str(held_out),
        "--unigram_from",
        str(path.shard("reviews")),
        "--output",
        str(path.evaluation),
    )
    inputs = (path.model, held_out, path.manifest("reviews"))
    return (Step("evaluation", command, inputs, (path.evaluation,)),)


def _finetuning(path: _Paths, chosen: Preset) -> tuple[Step, ...]:
    train, test = path.text("train.csv"), path.text("test.csv")
    files = ("--train_file", str(train), "--test_file", str(test))
    command = (*path.module("baseline"), *files, "--output", str(path.baseline))
    steps = [Step("tfidf", command, (train, test), (path.baseline,))]
    for seed in SEEDS:
        for start in STARTS:
            folder = path.classifier(start, seed)
            command = (
                *path.tool("finetune"),
                *("--model", str(path.model), "--task", "classification"),
                *("--train_file", str(train), "--validation_file", str(test), "--output", str(folder)),
                *("--epochs", str(chosen.epochs), "--learning_rate", str(chosen.learning_rate)),
                *("--seed", str(seed)),
                *(("--from_scratch",) if start == "random" else ()),
            )
            steps.append(Step(f"finetuning-{start}-{seed}", command, (path.model, train, test), (folder,)))
    return tuple(steps)


def _summary(path: _Paths) -> tuple[Step, ...]:
    curves, summary = path.output / "curves.png", path.output / "summary.json"
    picture = (*path.tool("plot_run"), "--run", str(path.run), "--output", str(curves))
    table = (*path.module("summary"), "--root", str(path.output))
    return (
        Step("curves", picture, (path.run / "metrics.jsonl",), (curves,)),
        Step("summary", table, (), (summary,), always=True),
    )


def _python(repository: Path) -> str:
    """This interpreter, by its short name where it lies in the repository."""
    python = Path(os.path.abspath(sys.executable))
    return str(python.relative_to(repository)) if python.is_relative_to(repository) else str(python)
