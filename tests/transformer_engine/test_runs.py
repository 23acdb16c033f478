"""Runs with Transformer Engine's layers, FP8 and kernels of Adam, beside those without."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metro_megatron.config.schema import Config
from tests.parity.small_run import Record, small_config

TE: dict[str, Any] = {"transformer_impl": "transformer_engine"}
TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
SP: dict[str, Any] = {**TP, "sequence_parallel": True, "recompute": "full"}
PARTS: dict[str, Any] = {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}
UNEVEN: dict[str, Any] = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tttL"}
CHUNKS: dict[str, Any] = {
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "overlap": False,
}
WithTE = Callable[..., list[Any]]


def fp8(recipe: str = "tensorwise", rate: float = 1e-2, std: float = 0.02, **parallel: Any) -> Config:
    """In bf16, an auxiliary of 3 layers, and rates at which weights change visibly in a few steps."""
    return small_config(
        model={"auxiliary_num_layers": 3, "init_method_std": std},
        parallel={**TE, **parallel},
        optimizer={"lr": rate},
        train={"precision": "bf16", "fp8_recipe": recipe},
    )


def losses(record: Record) -> list[list[float]]:
    """[steps, 3]."""
    return [[figures[f"{name}_loss"] for name in ("aux", "rtd", "clm")] for figures in record.figures]


def assert_equal(one: Record, two: Record) -> None:
    np.testing.assert_equal(one.figures, two.figures)  # some are NaN
    assert one.grad_norms == two.grad_norms
    assert one.weights.keys() == two.weights.keys()
    assert [name for name in one.weights if not torch.equal(one.weights[name], two.weights[name])] == []


def test_layers_have_the_same_parameters_and_shards(with_te: WithTE) -> None:
    """Names, shapes, marks of tensor and sequence parallelism, keys, offsets: checkpoints are those of local layers."""
    configs = [small_config(parallel={**SP, **impl}) for impl in ({}, TE)]
    for local, other in with_te("described", 2, configs):
        assert (local.pop("kinds"), other.pop("kinds")) == (
            {"ColumnLinear", "RowLinear"},
            {"TEColumnParallelLinear", "TERowParallelLinear"},
        )
        assert local == other


@pytest.mark.parametrize(
    ("ranks", "rows", "layouts"),
    [
        (1, "packed", [{}, PARTS]),
        (2, "packed", [SP]),
        pytest.param(
            *(2, "packed", [TP, UNEVEN, {**SP, **PARTS}, {**UNEVEN, "recompute": "selective"}]), marks=pytest.mark.long
        ),
        pytest.param(2, "padded", [{}, CHUNKS], marks=pytest.mark.long),
        pytest.param(4, "packed", [{**TP, **CHUNKS}], marks=pytest.mark.long),
    ],
)
def test_training_equals_local_layers_bit_for_bit(
    with_te: WithTE, ranks: int, rows: str, layouts: list[dict[str, Any]]
) -> None:
    """Losses, gradient norms and weights of six steps; gradients are added up by the products themselves."""
    data = {"row_format": rows}
    configs = [small_config(data=data, parallel={**layout, **impl}) for layout in layouts for impl in ({}, TE)]
    records = with_te("train_in_layouts", ranks, configs)[0]
    for local, other in zip(records[::2], records[1::2], strict=True):
        assert_equal(local, other)


@pytest.mark.long
def test_early_exits_keep_the_gradients_of_keys_and_values(with_te: WithTE) -> None:
    """Rows that have left read a part of a weight that Transformer Engine's product reads as a whole."""
    exits = {"layers": [1, 2], "share": "0.5"}
    configs = [small_config(parallel=impl, early_exit=exits) for impl in ({}, TE)]
    local, other = with_te("train_in_layouts", 1, configs)[0]
    np.testing.assert_allclose(losses(other), losses(local), rtol=1e-6)
    assert [norm for norm, *_ in other.grad_norms] == pytest.approx([norm for norm, *_ in local.grad_norms], rel=1e-5)


def test_fp8_copies_of_weights_are_todays(with_te: WithTE) -> None:
    """In both encoders, whose first and last layers have none. Weights as large as trained ones: samples' states are
    moved by each other's scales, of which the self-check says nothing."""
    _, counts, stale = with_te("fp8_runs", 1, [fp8(std=0.1)], 2)[0][0]
    assert counts == {"auxiliary": {1: 0, 2: 4, 3: 0}, "main": {1: 0, 2: 4, 3: 4, 4: 0}}
    assert stale == []


@pytest.mark.long
def test_fp8_changes_losses_a_little_and_recomputation_does_not(with_te: WithTE) -> None:
    configs = [fp8(recipe="none"), fp8(), fp8(recompute="full"), fp8(**PARTS)]
    (plain, counts, _), (eight, *_), (again, *_), (parts, *_) = with_te("fp8_runs", 1, configs)[0]
    assert {number for layers in counts.values() for number in layers.values()} == {0}
    assert losses(again) == losses(parts) == losses(eight) != losses(plain)
    np.testing.assert_allclose(losses(eight), losses(plain), rtol=1e-2)


@pytest.mark.long
def test_fp8_in_other_layouts(with_te: WithTE) -> None:
    """Scales are of a rank's rows: losses agree as far as FP8 goes, copies of weights are today's everywhere, and
    main's first and last layers have none, whichever stage holds them."""
    one = with_te("fp8_runs", 1, [fp8(rate=1e-3)])[0][0][0]
    ranks = with_te("fp8_runs", 2, [fp8(rate=1e-3, **layout) for layout in (SP, UNEVEN)])
    assert [stale for runs in ranks for _, _, stale in runs] == [[]] * 4
    assert [counts["main"] for _, (_, counts, _) in ranks] == [{1: 0}, {2: 4, 3: 4, 4: 0}]
    for record, *_ in ranks[0]:
        np.testing.assert_allclose(losses(record), losses(one), rtol=1e-2)


def test_no_pickle_of_a_checkpoint_is_read_or_written(with_te: WithTE) -> None:
    kept, names, tensors = with_te("extra_states", 1, fp8())[0]
    assert kept > 0 and names > 0 and tensors == 0


def test_a_run_changes_layers_and_adam_at_a_checkpoint(with_te: WithTE, tmp_path: Path) -> None:
    """torch, Transformer Engine, Apex, torch: masters, moments and weights are equal, and the steps behind them."""
    folders = [tmp_path / name for name in ("run", "te", "apex", "torch")]
    for folder in folders:
        folder.mkdir()
    made: list[Config] = []
    for impl, adam in (({}, "torch"), (TE, "transformer_engine"), (TE, "apex"), ({}, "torch")):
        output = folders[max(0, len(made) - 1)]
        made.append(
            small_config(
                parallel=impl, optimizer={"adam_impl": adam}, train={"output": str(output), "precision": "bf16"}
            )
        )
    (straight, *_), *resumed = with_te("relay", 1, made, folders[1:])[0]
    for record, names, different in resumed:
        assert different == []
        assert {"exp_avg", "exp_avg_sq", "param"} <= {name.split(".")[2] for name in names if "optimizer.state" in name}
        norms = [[norm for norm, _, _ in run.grad_norms[-3:]] for run in (record, straight)]
        np.testing.assert_allclose(*norms, rtol=2e-3)
    assert_equal(resumed[-1][0], Record(straight.figures[3:], straight.grad_norms[3:], straight.weights))


def test_kernel_is_given_what_transformer_engines_own_optimizer_gives_it(with_te: WithTE) -> None:
    ours, theirs = with_te("fused_adams", 1, 6)[0]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.long
def test_the_python_alone_does_not_end_a_run(site: str) -> None:
    """Transformer Engine's own half-installed package, of whose error megatron-core dies."""
    program = (
        "from metro_megatron.train.launch import import_megatron; import_megatron();"
        "from metro_megatron import nvidia; print(nvidia.describe('auto', 'cuda', 'bf16', 'none', 'torch'));"
        "from metro_megatron.model.linear import TRANSFORMER_ENGINE; assert TRANSFORMER_ENGINE == ()"
    )
    paths = os.pathsep.join([site, os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert (
        "megatron-core's linear layers (Transformer Engine is installed but does not load (RuntimeError" in found.stdout
    )
