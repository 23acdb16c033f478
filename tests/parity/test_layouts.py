"""The layout does not change the mathematics: real gloo ranks against one process, fp32, with dropout.

Dropout masks are functions of global coordinates, so that they too are the same in every layout and row format.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from metro_megatron.config.schema import Config
from metro_megatron.data.loader import PretrainingData
from metro_megatron.mcore import group_micro_batches
from tests.distributed import run_ranks
from tests.parity.small_run import STEPS, Record, corrupted_samples, small_config, small_corpus, train_in_layouts

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.txt"
LOSSES = ("aux_loss", "rtd_loss", "clm_loss")
TOLERANCE = 1e-6  # relative; fp32 sums in another order


def dropping(**concerns: dict[str, Any]) -> Config:
    return small_config(model={"hidden_dropout": 0.1, "attention_dropout": 0.1}, **concerns)


def layout(tp: int = 1, pp: int = 1, vpp: int = 1, **parallel: object) -> Config:
    return dropping(
        parallel={
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": vpp,
            **parallel,
        }
    )


LAYOUTS = {
    1: [
        layout(overlap=False),
        layout(recompute="full"),
        dropping(data={"row_format": "padded"}),
        dropping(data={"micro_batch_tokens": 50}),
    ],
    2: [
        layout(),
        layout(tp=2),
        layout(pp=2),
        layout(tp=2, sequence_parallel=True),
        layout(pp=2, vpp=2),
        dropping(data={"row_format": "padded"}, parallel={"pipeline_model_parallel_size": 2}),
    ],
    3: [dropping(data={"micro_batch_tokens": 400})],
    4: [
        layout(),
        layout(tp=2, pp=2),
        layout(tp=2, pp=2, vpp=2, sequence_parallel=True, recompute="full"),
        layout(pp=4, overlap=False),
    ],
    8: [layout(tp=2, pp=2)],
}
"""World size to configurations; data parallelism is what remains. With pp = 4 some ranks have no auxiliary work."""


@pytest.fixture(scope="module")
def reference() -> Record:
    return run_ranks(train_in_layouts, 1, [dropping()])[0][0]


def losses(record: Record) -> np.ndarray:
    """[steps, 3] losses."""
    return np.array([[figures[name] for name in LOSSES] for figures in record.figures])


def norms(record: Record) -> np.ndarray:
    """[steps] gradient norms over both homes."""
    return np.array([total for total, _, _ in record.grad_norms])


@pytest.mark.parametrize("world_size", [1, 2, 3, *(pytest.param(size, marks=pytest.mark.long) for size in (4, 8))])
def test_layouts_equal_one_process(reference: Record, world_size: int) -> None:
    """Losses, norms, metrics and weights of six steps; replicas are compared bit for bit on the ranks."""
    configs = LAYOUTS[world_size]
    for config, record in zip(configs, run_ranks(train_in_layouts, world_size, configs)[0], strict=True):
        assert_same(record, reference, str((world_size, config.parallel, config.data.row_format)))


def assert_same(record: Record, reference: Record, message: str) -> None:
    np.testing.assert_allclose(losses(record), losses(reference), rtol=TOLERANCE, err_msg=message)
    np.testing.assert_allclose(norms(record), norms(reference), rtol=TOLERANCE, err_msg=message)
    for figures, expected in zip(record.figures, reference.figures, strict=True):
        same = {name: value for name, value in expected.items() if name != "non_pad_fraction"}
        assert {name: figures[name] for name in same} == pytest.approx(same, rel=1e-5, nan_ok=True), message
    assert record.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        torch.testing.assert_close(record.weights[name], weight, rtol=0, atol=1e-6, msg=f"{message} {name}")


MODELS = {
    "pre-LN, all shared, no relative positions": {
        "norm_first": True,
        "relative_bucket": "none",
        "shared_embeddings": "token_position_norm",
        "shared_lm_bias": True,
    },
    "projected embeddings, a narrow auxiliary, dense heads": {
        "embedding_size": 24,
        "auxiliary_hidden_size": 32,
        "auxiliary_num_attention_heads": 2,
        "auxiliary_ffn_hidden_size": 64,
        "rtd_head": "dense",
        "lm_head": "dense",
    },
    "TUPE, nothing shared": {"untied_positions": True, "relative_bucket": "t5", "shared_embeddings": "none"},
}


def test_other_models_equal_one_process_too() -> None:
    """Tensor and pipeline parallelism, interleaved, with sequence parallelism and recomputation, all at once."""
    alone, spread = (
        [replace(config, model=replace(config.model, **changes)) for changes in MODELS.values()]
        for config in (dropping(), layout(tp=2, pp=2, vpp=2, sequence_parallel=True, recompute="full"))
    )
    references, (records, *_) = run_ranks(train_in_layouts, 1, alone)[0], run_ranks(train_in_layouts, 4, spread)
    for name, record, reference in zip(MODELS, records, references, strict=True):
        assert_same(record, reference, name)


@pytest.mark.parametrize(
    ("world_size", "spread"),
    [
        (2, [{}, {"tp": 2, "sequence_parallel": True}]),
        pytest.param(4, [{"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2, "overlap": False}], marks=pytest.mark.long),
    ],
)
def test_muon_equals_one_process_in_what_it_learns(world_size: int, spread: list[dict[str, Any]]) -> None:
    """Losses and norms as with Adam; matrices to a tenth of a step.

    Directions are rounded to bf16 before the weakest of theirs are stretched a hundredfold, so that sums in another
    order show there, where gradients hardly are.
    """
    options = {"matrices": "muon", "auxiliary_matrices": "muon", "auxiliary_adam_beta2": 0.9}
    configs = [replace(one, optimizer=replace(one.optimizer, **options)) for one in (layout(**how) for how in spread)]
    alone = replace(configs[0], parallel=layout().parallel)
    reference = run_ranks(train_in_layouts, 1, [alone])[0][0]
    for config, record in zip(configs, run_ranks(train_in_layouts, world_size, configs)[0], strict=True):
        np.testing.assert_allclose(losses(record), losses(reference), rtol=TOLERANCE, err_msg=str(config.parallel))
        np.testing.assert_allclose(norms(record), norms(reference), rtol=TOLERANCE, err_msg=str(config.parallel))
        for name, weight in reference.weights.items():
            difference = record.weights[name] - weight
            if ".layers." in name and weight.dim() == 2:
                assert difference.square().mean().sqrt() < 0.1 * 0.2 * config.optimizer.lr, name
            else:
                assert difference.abs().max() < 1e-5, name


def test_any_number_of_micro_batches_interleaves() -> None:
    """Seven micro batches, which are no multiple of the stages, on two stages of two chunks."""
    rows = {"data": {"micro_batch_tokens": 48}, "train": {"global_batch_size": 7}}
    alone = small_config(**rows)
    stages = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    spread, corpus = small_config(parallel=stages, **rows), small_corpus(alone)
    data = PretrainingData(corpus.train_index, corpus.train_shards, spread)
    assert 7 in {len(data.step_batch(step, 7 * step).micro_batches) for step in range(STEPS)}
    reference = run_ranks(train_in_layouts, 1, [alone])[0][0]
    assert_same(run_ranks(train_in_layouts, 2, [spread])[0][0], reference, "7 micro batches")


@pytest.mark.parametrize(
    ("stages", "count", "group"), [(2, 2, 2), (2, 7, 4), (2, 8, 2), (4, 5, 5), (4, 7, 7), (4, 9, 5), (4, 11, 6)]
)
def test_groups_of_micro_batches(stages: int, count: int, group: int) -> None:
    config = TransformerConfig(num_layers=4, hidden_size=8, num_attention_heads=1)
    config.pipeline_model_parallel_size = stages
    group_micro_batches(config, count)
    assert config.microbatch_group_size_per_vp_stage == group


@pytest.mark.long
def test_interleaved_stages_with_two_neighbours_equal_one_process() -> None:
    """Their exchanges run beside the computation; previous and next stage are two ranks only from four stages on."""
    deep = {"num_layers": 8, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    stages = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    reference = run_ranks(train_in_layouts, 1, [small_config(model=deep)])[0][0]
    record = run_ranks(train_in_layouts, 4, [small_config(model=deep, parallel=stages)])[0][0]
    assert_same(record, reference, "pp 4, vpp 2")


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        pytest.param({"tensor_model_parallel_size": 2}, marks=pytest.mark.long),
        pytest.param({"pipeline_model_parallel_size": 2}, marks=pytest.mark.long),
    ],
    ids=["data", "tensor", "pipeline"],
)
def test_the_norm_of_a_large_table_is_that_of_one_process(parallel: dict[str, Any]) -> None:
    """Over 2^18 elements of the token table on every rank, of which a float32 sum would be 1e-5 off."""
    model = {"vocab_size": 8448, "num_layers": 2, "auxiliary_num_layers": 1}
    reference = run_ranks(train_in_layouts, 1, [small_config(model=model)])[0][0]
    record = run_ranks(train_in_layouts, 2, [small_config(model=model, parallel=parallel)])[0][0]
    np.testing.assert_allclose(norms(record), norms(reference), rtol=TOLERANCE)
    np.testing.assert_allclose(losses(record), losses(reference), rtol=TOLERANCE)


def test_packed_equals_padded_on_edge_cases() -> None:
    """One-token documents, documents of one token more and less than a sample holds, very long ones."""
    packed = small_config(data={"train": ["edge"]})
    padded = small_config(data={"train": ["edge"], "row_format": "padded"})
    one, other = run_ranks(train_in_layouts, 1, [packed, padded])[0]
    np.testing.assert_allclose(losses(one), losses(other), rtol=TOLERANCE)
    np.testing.assert_allclose(norms(one), norms(other), rtol=TOLERANCE)


def test_losses_are_golden(reference: Record) -> None:
    """Losses and norms without dropout never change by accident; processors differ in the last bits only.

    One line per step: MLM, RTD, CLM loss, gradient norm.
    """
    plain = run_ranks(train_in_layouts, 1, [small_config()])[0][0]
    np.testing.assert_allclose(np.column_stack([losses(plain), norms(plain)]), np.loadtxt(GOLDEN), rtol=1e-5)
    main_losses = losses(plain)[:, 1:]
    assert (main_losses != losses(reference)[:, 1:]).all(), "dropout did nothing"


def test_corrupted_ids_are_the_same_everywhere() -> None:
    """Sampled replacements of the first step, token by token, for every layout and row format."""
    (expected,) = run_ranks(corrupted_samples, 1, small_config())
    padded = small_config(data={"row_format": "padded", "micro_batch_size": 2})
    for world_size, config in ((1, padded), (2, layout(tp=2)), (2, layout()), (4, layout(tp=2, pp=2))):
        merged: dict[int, list[int]] = {}
        for samples in run_ranks(corrupted_samples, world_size, config):
            for sample, ids in samples.items():
                assert merged.setdefault(sample, ids) == ids, sample
        assert merged == expected, (world_size, config.parallel)
