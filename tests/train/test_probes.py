"""Frozen features while a run trains: an export's, the same in every layout, and training does not notice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.evaluate.frozen import frozen_features, probe
from metro_megatron.hf.export import metro_config
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.hf.weights import hf_state_dict
from metro_megatron.plan.flops import Amount, model_flops, works
from metro_megatron.probing.features import EncodedTexts
from metro_megatron.probing.folder import ProbeTask
from metro_megatron.probing.kinds import GAP, KINDS, Row
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.train import trainer as module
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.probes import MOST_TEXTS
from metro_megatron.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.hf.pair import WORDS, write_tokenizer
from tests.parity.small_run import Figures, random_vectors, small_config, small_corpus, whole_weights


def sentence(number: int, length: int = 9) -> str:
    return " ".join(WORDS[(number * (place + 3) + place) % len(WORDS)] for place in range(length))


def rows(kind: str, count: int, first: int) -> list[Row]:
    """Texts of made-up words, some longer than a sample."""
    found: list[dict[str, Any]] = []
    for number in range(first, first + count):
        text, other = sentence(number, 3 + number % 7 * 5), sentence(2 * number + 1)
        tags = ["code" if len(word) > 4 else "O" for word in text.split()]
        label = "long" if number % 7 > 3 else "short"
        found.append(
            {
                "classification": {"text": text, "label": label},
                "pairs": {"text_a": text, "text_b": other, "label": label},
                "retrieval": {"text_a": text, "text_b": other},
                "choice": {"text": f"{other} {GAP} {text}", "choices": WORDS[:3], "answer": number % 3},
                "spans": {"words": text.split(), "tags": tags},
            }[kind]
        )
    return [{"id": f"{kind}-{number}", **row} for number, row in enumerate(found)]


TASKS = tuple(ProbeTask(name, kind, rows(name, 20, 0), rows(name, 16, 20), {}) for name, kind in KINDS.items())


def trainer_of(config: Config, tokenizer: Path, tasks: tuple[ProbeTask, ...] = TASKS) -> Trainer:
    corpus = small_corpus(config)
    shards = [replace(shard, tokenizer_path=str(tokenizer)) for shard in corpus.train_shards]  # type: ignore[type-var]
    trainer = Trainer(config, replace(corpus, train_shards=shards, probe_tasks=tasks), torch.device("cpu"))
    random_vectors(trainer)
    return trainer


def train(config: Config, tokenizer: Path) -> tuple[Figures, list[np.ndarray], dict[str, torch.Tensor]]:
    """The last probe's figures, its features, and the weights in the end."""
    with patch.object(module, "copy_tokenizer"), patch.object(module.Report, "say"):
        trainer = trainer_of(config, tokenizer)
        trainer.train()
        trainer.homes.fetch_parameters()
        features = [trainer.probes.features(trainer.step, one) for one in trainer.probes.readings]
        figures = trainer.probes.figures(trainer.step)
        weights = whole_weights(trainer)
        trainer.close()
    return figures, features, weights


def train_both(configs: list[Config], tokenizer: Path) -> list[Any]:
    return [train(config, tokenizer) for config in configs]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("probes") / "tokenizer")


def lines(config: Config) -> list[str]:
    return (Path(config.train.output) / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(("interval", "tasks"), [(5, ""), (-1, ""), (-1, "tasks")])
def test_a_folder_is_read_only_where_an_interval_and_tasks_are_given(interval: int, tasks: str) -> None:
    """The configuration's own mistake is named elsewhere, and is enough."""
    config = small_config(train={"probe_interval": interval, "probe_tasks": tasks}, data={"train": ["nowhere"]})
    with pytest.raises(UserError) as error:
        Corpus.open(config)
    assert not any("tasks" in problem for problem in error.value.problems)


def test_training_does_not_notice_and_features_are_an_exports(tmp_path: Path, tokenizer: Path) -> None:
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    with_probes, without = (
        small_config(
            train={"output": str(tmp_path / str(interval)), "train_steps": 3, "probe_interval": interval}, model=dropout
        )
        for interval in (2, 0)
    )
    (((figures, features, weights), (_, _, others)),) = run_ranks(train_both, 1, [with_probes, without], tokenizer)
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    parsed = [json.loads(line) for line in lines(with_probes)]
    probes = [line for line in parsed if "probe/spans" in line]
    losses = [[line[name] for name in ("aux_loss", "rtd_loss", "clm_loss")] for line in parsed if "aux_loss" in line]
    plain = [[line[name] for name in ("aux_loss", "rtd_loss", "clm_loss")] for line in map(json.loads, lines(without))]
    assert losses == plain and [line["step"] for line in probes] == [2, 3]
    assert probes[-1] == {"step": 3, **{f"probe/{name}": value for name, value in figures.items()}}
    assert figures.keys() == KINDS.keys()

    pair = MetroForPreTraining(metro_config(with_probes.model))
    pair.load_state_dict(hf_state_dict(weights, with_probes.model), strict=True)
    pair.tie_weights()
    # The run cuts texts at its longest sample, an export where its positions end.
    pair.metro.config.max_position_embeddings = with_probes.data.seq_length
    words = Tokenizer.from_folder(tokenizer)
    for task, found in zip(TASKS, features, strict=True):
        scores, num_cut = probe(pair.metro, words, task)
        assert scores.figures[task.kind.metric] == pytest.approx(figures[task.name], abs=0.05) and num_cut > 0
        texts = task.kind.texts([*(task.train if task.kind.learns else [])]) + task.kind.texts(task.test)
        expected = frozen_features(pair.metro.eval(), EncodedTexts.of(texts, words, 46))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def features_in(layouts: list[Config], tokenizer: Path) -> list[list[np.ndarray]]:
    found = []
    for config in layouts:
        trainer = trainer_of(config, tokenizer, TASKS[-1:])
        trainer.homes.fetch_parameters()
        found.append([trainer.probes.features(trainer.step, one) for one in trainer.probes.readings])
        trainer.close()
    return found


def layout(tp: int = 1, pp: int = 1, vpp: int = 1, data: dict[str, Any] | None = None, **more: Any) -> Config:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return small_config(parallel={**sizes, "virtual_pipeline_model_parallel_size": vpp, **more}, data=data or {})


def test_every_layout_has_the_features_of_one_process(tokenizer: Path) -> None:
    """Equal bit for bit on two data-parallel ranks, which share rows; elsewhere up to the order of sums."""
    padded = {"row_format": "padded"}
    ((one, one_padded),) = run_ranks(features_in, 1, [layout(), layout(data=padded)], tokenizer)
    layouts = [layout(), layout(tp=2, sequence_parallel=True), layout(pp=2, data=padded), layout(pp=2, vpp=2)]
    on_two, same = run_ranks(features_in, 2, layouts, tokenizer)
    for own, other in zip(on_two, same, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(own, other, strict=True)), "ranks differ"
    assert all(np.array_equal(*pair) for pair in zip(on_two[0], one, strict=True))
    for found in (*on_two, one_padded):
        for mine, expected in zip(found, one, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=0, atol=2e-5)


def test_ten_tasks_are_less_than_a_hundredth_of_a_hundred_steps_at_base() -> None:
    """By plan/'s counter: forward through main's layers of both sides' texts, all as long as a sample may be."""
    config = Config()
    texts = 10 * 2 * MOST_TEXTS
    read = sum(work.forward(Amount.of_samples(texts, 512)) for work in works(config) if work.where == "layers")
    step = model_flops(config, Amount.of_samples(2048, 512))
    assert 0.4 * step < read < 0.01 * 100 * step
