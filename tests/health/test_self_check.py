"""The look before the first step: silent where all is well, in every layout, and nobody could tell that it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.health.shards import WeightNorms, fingerprint
from metro_megatron.train import trainer as module
from metro_megatron.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start, whole_weights
from tests.zoo.lives import corpus_of

DROPS = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def look_and_train(
    config: Config,
) -> tuple[list[str], list[dict[str, Any]], dict[str, torch.Tensor], str, torch.Tensor]:
    """What was said, the figures of a step each, and the state afterwards."""
    said: list[str] = []
    with patch.object(module, "copy_tokenizer"), patch.object(module.Report, "say", lambda _, line: said.append(line)):
        trainer = start(config)
        trainer.train()
    trainer.homes.fetch_parameters()
    state = fingerprint(trainer.pair, trainer.optimizer, trainer.layout)
    weights, norms = whole_weights(trainer), WeightNorms(trainer.pair, trainer.optimizer, trainer.layout).measure()
    for name, weight in weights.items():
        norm, size = norms[name]
        assert size == weight.numel(), name
        # In bf16 it is the norm of the masters.
        rel = 1e-12 if config.train.precision == "fp32" else 4e-3
        assert norm == pytest.approx(float(weight.double().norm()), rel=rel), name
    trainer.close()
    lines = [json.loads(line) for line in (Path(config.train.output) / "metrics.jsonl").read_text().splitlines()]
    return said, lines, weights, state, torch.random.get_rng_state()


def config_of(folder: Path, looks: bool, **concerns: Any) -> Config:
    train = {"train_steps": 3, "output": str(folder / str(looks)), "self_check": looks, **concerns.pop("train", {})}
    return small_config(train=train, **concerns)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"model": DROPS}),
    "pp2": (2, {"parallel": {"pipeline_model_parallel_size": 2}, "model": DROPS}),
    "dp2 padded": (2, {"data": {"row_format": "padded"}}),
    "tp2 pp2 vpp2 sp recomputed": (
        4,
        {
            "parallel": {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "sequence_parallel": True,
                "recompute": "full",
            },
        },
    ),
    "bf16, no overlap": (1, {"train": {"precision": "bf16"}, "parallel": {"overlap": False}}),
    "all losses": (1, {"objective": {"main": ["rtd", "clm", "cloze", "scl"], "clm": "mixture"}}),
    "BERT": (1, {"corruption": {"source": "none"}, "objective": {"main": ["mlm"]}}),
    "early exit": (1, {"early_exit": {"layers": [1], "share": "0.5"}}),
    "untied, T5": (1, {"model": {"untied_positions": True, "relative_bucket": "t5"}}),
    "empty ranks": (
        2,
        {
            "data": {"row_format": "padded", "micro_batch_size": 8},
            "train": {"global_batch_size": 8},
            "model": {**DROPS, "auxiliary_dropout": "train"},
        },
    ),
    "main fills, eval": (1, {"corruption": {"source": "main"}, "model": {**DROPS, "auxiliary_dropout": "eval"}}),
}  # fmt: skip
QUICK = ("one", "pp2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in LAYOUTS]
)
def test_it_is_silent_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    """Losses, norms, weights, moments and torch's generator are bit for bit those of a run without it."""
    ranks, concerns = LAYOUTS[name]
    with_it, without = (
        run_ranks(look_and_train, ranks, config_of(tmp_path, looks, **concerns))[0] for looks in (True, False)
    )
    assert sum(line.startswith("self-check: ") for line in with_it[0]) == 1
    assert not any(line.startswith("self-check") for line in without[0])
    timing = {"tokens_per_second", "tflops_per_gpu", "seconds_per_step", "data_share", "mfu"}
    for one, other in zip(with_it[1], without[1], strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}
    assert with_it[3] == without[3] and torch.equal(with_it[4], without[4])
    for key, weight in without[2].items():
        assert torch.equal(with_it[2][key], weight), key


ODD: dict[str, dict[str, Any]] = {
    "one sample, two masks, half dropped": {
        "objective": {"main": ["rtd", "clm", "scl"]},
        "model": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
        "data": {"seq_length": 12},
        "train": {"global_batch_size": 1},
    },
    "the sample that is changed is all masks": {
        "corruption": {"source": "none"},
        "objective": {"main": ["mlm"], "mask_probability": 0.999},
    },
    "one word is drawn": {"corruption": {"temperature": 0.001}, "model": {"init_method_std": 0.5}},
    "of two words the other is drawn": {
        "corruption": {"source": "uniform", "disallow_correct": True},
        "model": {"vocab_size": 7},
        "objective": {"mask_probability": 0.5},
    },
    "too small for its format": {
        "model": {"init_method_std": 0.001},
        "objective": {"rtd_weight": 1e-9},
        "train": {"precision": "fp16"},
    },
    "most leave early": {
        "early_exit": {"layers": [1], "share": "0.9", "rule": "random"},
        "objective": {"main": ["rtd", "scl"]},
        "data": {"micro_batch_tokens": 48},
    },
    "one mask in 16 bits": {
        "model": {
            "init_method_std": 0.1,
            "vocab_size": 10,
            "norm_first": True,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
        },
        "objective": {"rtd_weight": 1e-6},
        "data": {"seq_length": 4},
        "train": {"precision": "bf16", "global_batch_size": 1, "seed": 6},
    },
}

FEW = ("one sample, two masks, half dropped", "most leave early", "one mask in 16 bits")


def looked_at(configs: list[Config]) -> list[str]:
    """What is said of each before its first step."""
    said: list[str] = []
    for config in configs:
        trainer = Trainer(config, corpus_of(config, 7), torch.device("cpu"))
        try:
            trainer._check(Mock(say=said.append), trainer.corpus.training_data(trainer.layout))
        except UserError as error:
            said.append(str(error))
        trainer.close()
    return said


def test_odd_options_are_no_fault() -> None:
    """What is too few, too small or too sure to show that all is well."""
    tiny = {"hidden_size": 16, "ffn_hidden_size": 32, "num_layers": 2, "auxiliary_num_layers": 1, "vocab_size": 128}
    configs = [
        small_config(**{**concerns, "model": {**tiny, **concerns.get("model", {})}}) for concerns in ODD.values()
    ]
    (said,) = run_ranks(looked_at, 1, configs)
    for name, line in zip(ODD, said, strict=True):
        assert line.startswith("self-check: batches"), (name, line)
        assert ("as few masks get through" in line) == (name in FEW), (name, line)


def trained_and_resumed(config: Config) -> list[str]:
    """What is said in two more steps of a run that has come to its end."""
    said: list[str] = []
    with patch.object(module, "copy_tokenizer"), patch.object(module.Report, "say", lambda _, line: said.append(line)):
        trainer = start(replace(config, train=replace(config.train, self_check=False)))
        trainer.train()
        trainer.close()
        steps = config.train.train_steps + 2
        trainer = start(replace(config, train=replace(config.train, train_steps=steps, override=["train.train_steps"])))
        trainer.restore()
        trainer.train()
        trainer.close()
    return said


@pytest.mark.long
@pytest.mark.parametrize("name", ["bf16", "mixture"])
def test_it_is_silent_at_a_resume(name: str, tmp_path: Path) -> None:
    """States that hardly depend on the text any more, a loss that bends, gradients that are no derivative."""
    objective = {"main": ["rtd", "clm", "cloze", "scl"], "clm": "mixture"}
    concerns = {
        "bf16": {"train": {"precision": "bf16"}, "optimizer": {"lr": 5e-3}},
        "mixture": {"objective": objective},
    }
    of_run: dict[str, dict[str, Any]] = concerns[name]
    train = {**of_run.pop("train", {}), "train_steps": 40, "log_interval": 40}
    (said,) = run_ranks(trained_and_resumed, 1, config_of(tmp_path, True, train=train, **of_run))
    (line,) = (line for line in said if line.startswith("self-check: "))
    assert ("derivatives were not looked at" in line) == (name == "mixture")


def resumed_with_a_dead_layer(config: Config, looks: bool, is_cut: bool) -> tuple[list[str], str]:
    """What is said in two more steps of a run whose main's first FFN is silent for good, and its state then."""
    said: list[str] = []
    steps, train = config.train.train_steps, replace(config.train, self_check=False)
    with patch.object(module, "copy_tokenizer"), patch.object(module.Report, "say", lambda _, line: said.append(line)):
        trainer = start(replace(config, train=train))
        trainer.train()
        trainer.close()
        more = replace(train, train_steps=steps + 2, override=["train.train_steps"], self_check=looks)
        trainer = start(replace(config, train=more))
        trainer.restore()
        for chunk in trainer.pair.main:
            for name, parameter in chunk.named_parameters():
                if name.endswith("layers.0.mlp.linear_fc1.bias"):
                    parameter.data.fill_(-100)
                if is_cut and name.endswith("self_attention.linear_proj.weight"):
                    parameter.register_hook(torch.zeros_like)
        try:
            trainer.train()
        except UserError as error:
            said.extend(error.problems)
        state = fingerprint(trainer.pair, trainer.optimizer, trainer.layout)
        trainer.close()
    return said, state


DEAD = "no gradient reaches main.block.layers.0.mlp.linear_fc1"
LEARNED = "; of these weights, and no fault of the program: " + DEAD


@pytest.mark.parametrize(
    "ranks, parallel", [(1, {}), pytest.param(2, {"tensor_model_parallel_size": 2}, marks=pytest.mark.long)]
)
def test_what_a_run_has_learned_is_no_fault(ranks: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    """A layer that died is said, and the run goes on as without the look; what is wrong as well ends it."""
    looked, not_looked = (
        run_ranks(resumed_with_a_dead_layer, ranks, config_of(tmp_path, looks, parallel=parallel), looks, False)[0]
        for looks in (True, False)
    )
    assert sum(LEARNED in line for line in looked[0]) == 1 and looked[1] == not_looked[1]
    cut = config_of(tmp_path / "cut", True, parallel=parallel)
    said, _ = run_ranks(resumed_with_a_dead_layer, ranks, cut, True, True)[0]
    problems = [line for line in said if line.startswith("self-check: ")]
    assert "linear_proj" in problems[0] and not any(DEAD in line for line in problems)


def resumed_fingerprints(config: Config) -> tuple[str, str]:
    """Train and save; the state's fingerprint, and that of a trainer that has loaded it."""
    with patch.object(module, "copy_tokenizer"), patch.object(module.Report, "say"):
        trainer = start(config)
        trainer.train()
        first = fingerprint(trainer.pair, trainer.optimizer, trainer.layout)
        trainer.close()
        again = start(replace(config))
        again.restore()
        second = fingerprint(again.pair, again.optimizer, again.layout)
        again.close()
    return first, second


def restored_fingerprint(config: Config) -> str:
    trainer = start(config)
    trainer.restore()
    found = fingerprint(trainer.pair, trainer.optimizer, trainer.layout)
    trainer.close()
    return found


def test_the_fingerprint_of_weights_and_moments_is_that_of_every_layout(tmp_path: Path) -> None:
    parallel = {"tensor_model_parallel_size": 2}
    config = config_of(tmp_path, False)
    ((first, second),) = run_ranks(resumed_fingerprints, 1, config)
    split = replace(config, parallel=replace(config.parallel, **parallel))  # type: ignore[arg-type]
    assert {first, second} | set(run_ranks(restored_fingerprint, 2, split)) == {first}
