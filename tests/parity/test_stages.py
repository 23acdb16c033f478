"""Stages that hold different numbers of layers, and steps of few micro batches, change nothing but who does what."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metro_megatron.config.schema import Config
from metro_megatron.data.loader import PretrainingData
from metro_megatron.plan.stages import chunk_layers
from tests.checkpoint.test_save import HALF, all_tensors, equal_tensors, resumed_run, straight_run
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, small_corpus, train_in_layouts
from tests.parity.test_layouts import assert_same, layout

SAMPLES = 9
"""Of a step; in rows of 128 tokens, three micro batches."""


def staged(num_layers: int, pp: int, vpp: int = 1, chunks: str = "", **model: Any) -> Config:
    config = layout(pp=pp, vpp=vpp, pipeline_model_parallel_layout=chunks)
    train = replace(config.train, global_batch_size=SAMPLES)
    return replace(config, train=train, model=replace(config.model, num_layers=num_layers, **model))


def into(output: Path, config: Config) -> Config:
    return replace(config, train=replace(config.train, output=str(output)))


@pytest.mark.parametrize(
    ("world_size", "config", "expected"),
    [
        (2, staged(5, pp=2, vpp=2, chunks="Et|tt|t|tL", norm_first=True), [1, 2, 1, 1]),
        pytest.param(4, staged(5, pp=4), [1, 1, 2, 1], marks=pytest.mark.long),
        pytest.param(4, staged(9, pp=4, vpp=2), [1, 1, 2, 1, 1, 1, 1, 1], marks=pytest.mark.long),
    ],
)
def test_uneven_stages_equal_one_process(world_size: int, config: Config, expected: list[int]) -> None:
    """Plain and interleaved, post-LN and pre-LN, dropout on: losses, norms and weights of six steps."""
    assert chunk_layers(config) == expected
    reference = run_ranks(train_in_layouts, 1, [replace(config, parallel=layout().parallel)])[0][0]
    assert_same(run_ranks(train_in_layouts, world_size, [config])[0][0], reference, str(expected))


def test_three_layers_and_one_keep_moments_and_checkpoints(tmp_path: Path) -> None:
    """Adam's first moments, which are sums of gradients, are those of one process; two and two layers go on from it."""
    run, other, copy = (tmp_path / name for name in ("uneven", "alone", "copy"))
    for folder in (run, other, copy):
        folder.mkdir()
    reference = run_ranks(straight_run, 1, into(other, staged(4, pp=1)))[0]
    straight = run_ranks(straight_run, 2, into(run, staged(4, pp=2, chunks="Ettt|tL")))[0]
    assert_same(straight, reference, "3 + 1")
    resumed = run_ranks(resumed_run, 2, into(run, staged(4, pp=2, chunks="Ett|ttL")), copy)[0]
    assert run_ranks(equal_tensors, 1, *(one / f"iter_{HALF:07d}" for one in (run, copy)))[0][1] == []
    found, wanted = (run_ranks(all_tensors, 1, one / f"iter_{HALF:07d}")[0] for one in (run, other))
    moments = [name for name in wanted if "exp_avg." in name]
    assert len(moments) == len(reference.weights)
    for name in moments:
        assert (found[name] - wanted[name]).norm() <= 3e-6 * wanted[name].norm() + 1e-9, name
    for name, weight in straight.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("pp", "counts"), [(2, [1, 3]), pytest.param(4, [1, 2, 3, 6], marks=pytest.mark.long)])
def test_any_number_of_micro_batches(pp: int, counts: list[int]) -> None:
    """Fewer than the stages, whose ranks then have nothing to corrupt, and no multiple of them; a sample in each."""
    spread = [
        small_config(
            parallel={"pipeline_model_parallel_size": pp},
            data={"micro_batch_tokens": 48},
            train={"global_batch_size": count},
        )
        for count in counts
    ]
    for config, count in zip(spread, counts, strict=True):
        corpus = small_corpus(config)
        batch = PretrainingData(corpus.train_index, corpus.train_shards, config).step_batch(0, 0)
        assert len(batch.micro_batches) == count
    alone = [replace(config, parallel=layout().parallel) for config in spread]
    references, (records, *_) = run_ranks(train_in_layouts, 1, alone)[0], run_ranks(train_in_layouts, pp, spread)
    for count, record, reference in zip(counts, records, references, strict=True):
        assert_same(record, reference, f"{count} micro batches on {pp} stages")
