"""A short life of a tiny run, sick or healthy: what was said about it, and when."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metro_megatron.config.schema import Config
from metro_megatron.data.samples import build_sample_index
from metro_megatron.errors import UserError
from metro_megatron.train import trainer as module
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.trainer import Trainer
from tests.parity.small_run import small_config
from tests.zoo.text import repeating_text

Concerns = dict[str, dict[str, Any]]
STEPS = 200


def zoo_config(concerns: Concerns) -> Config:
    """A pair of 1 and 2 layers of width 32 and 256 words, fields of a concern overridden."""
    base: Concerns = {
        "model": {
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_layers": 2,
            "auxiliary_num_layers": 1,
            "vocab_size": 256,
            "init_method_std": 0.1,
            "relative_bias_init": "decay",
        },
        "data": {"seq_length": 40, "micro_batch_tokens": 1024},
        "objective": {"rtd_weight": 10.0},
        "optimizer": {"lr": 5e-3, "lr_warmup_steps": 20, "clip_grad": 2.0},
        "checkpoint": {"save_interval": 10_000},
        "train": {"train_steps": STEPS, "global_batch_size": 24, "log_interval": 10},
    }
    return small_config(**{name: {**base.get(name, {}), **concerns.get(name, {})} for name in {**base, **concerns}})


@dataclass(frozen=True)
class Fault:
    """An illness that is planted into a run; what detects it knows nothing of this."""

    name: str
    cause: str
    """A word or two that what is said must have: the right cause."""
    plant: Callable[[pytest.MonkeyPatch], None] = lambda patch: None
    """Before the run is built."""
    infect: Callable[[Trainer, pytest.MonkeyPatch], None] = lambda trainer, patch: None
    """Afterwards."""
    concerns: Concerns = field(default_factory=dict)
    ranks: int = 1
    resumes_after: int = 0
    """Steps of a healthy run before, which the sick one continues."""
    companions: tuple[str, ...] = ()
    """What may be said beside the right cause, as it is true too."""


@dataclass(frozen=True)
class Outcome:
    """What was said of a life."""

    said: list[tuple[int, str]]
    """(step, text); step 0: before the first one."""
    figures: dict[str, float]
    """Of its last line."""


def corpus_of(config: Config, text: int) -> Corpus:
    shard = repeating_text(text, config.model.vocab_size)
    index, *of_phases = (build_sample_index([shard], phase.data.seq_length) for phase in config.by_phase)
    return Corpus(config, [shard], index, [], None, of_phases)


def live(config: Config, folder: str, steps: int, illness: str, text: int = 7) -> Outcome:
    """On every rank: train up to `steps` steps in the run folder, with the fault of that name, or healthy."""
    from tests.zoo.faults import FAULTS  # functions that no pickle holds: named to other processes, found here

    fault = next((one for one in FAULTS if one.name == illness), None)
    data = replace(config.data, index_cache=f"{folder}/sample_index")  # else where the zoo was started
    config = replace(config, data=data, train=replace(config.train, output=folder))
    said: list[tuple[int, str]] = []
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(module, "copy_tokenizer", lambda *_: None)
        patch.setattr(module.Report, "say", lambda _, line: None)
        if fault:
            fault.plant(patch)
        trainer = Trainer(config, corpus_of(config, text), torch.device("cpu"))
        try:
            if fault:
                fault.infect(trainer, patch)
            trainer.restore()
            train = trainer.step.train

            def until(batch: Any, metrics: Any, stops: bool, limit: float) -> Any:
                return train(batch, metrics, stops or batch.step + 1 >= steps, limit)

            patch.setattr(trainer.step, "train", until)
            trainer.train()
        except UserError as error:
            said += [(trainer.progress.done, problem) for problem in error.problems]
        finally:
            trainer.close()
    path = Path(folder) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for line in lines:
        said += [(line["step"], f"{name} ({shown})") for name, shown in line.get("alarms", {}).items()]
    return Outcome(said, lines[-1] if lines else {})


def life(fault: Fault | None, concerns: Concerns, text: int = 7, steps: int = STEPS) -> Outcome:
    """A whole life in processes of its own."""
    from tests.distributed import run_ranks

    config, ranks = zoo_config(concerns), fault.ranks if fault else 1
    with tempfile.TemporaryDirectory() as folder:
        if fault and fault.resumes_after:
            run_ranks(live, ranks, config, folder, fault.resumes_after, "", text)
        return run_ranks(live, ranks, config, folder, steps, fault.name if fault else "", text)[0]
