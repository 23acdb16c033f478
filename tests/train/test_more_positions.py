"""A run of more positions than its first weights have: what was learned stays, what is new follows from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metro_megatron.checkpoint.files import iteration_folder
from metro_megatron.config.position import BUCKETS, PositionScheme
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.hf.export import write_hf_folder
from metro_megatron.hf.verify import hf_outputs, largest_differences, random_probe
from metro_megatron.train.initial_weights import InitialWeights
from metro_megatron.train.more_positions import more_rows
from metro_megatron.train.unsharded import trainer_outputs
from tests.distributed import run_ranks
from tests.hf.pair import write_tokenizer
from tests.parity.small_run import small_config
from tests.train.test_initial_weights import save_trained

FEW, MANY = 48, 256
SCHEMES: dict[str, dict[str, Any]] = {
    "COCO-LM's buckets, which reach further": {"relative_attention_max_distance": 128},
    "T5's, TUPE": {"relative_bucket": "t5", "relative_attention_max_distance": 32, "untied_positions": True},
    "no reset": {"reset_cls": False, "shared_embeddings": "token_position"},
}


def config_of(positions: int, changes: dict[str, Any], **train: Any) -> Config:
    model = {**changes, "max_position_embeddings": positions, "num_layers": 2, "auxiliary_num_layers": 1}
    data = {"seq_length": positions, "micro_batch_tokens": max(128, positions)}
    return small_config(model=model, data=data, train={"global_batch_size": 3, **train})


def test_rows_begin_again_or_are_stretched() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
    assert more_rows(rows, 4, 1, "repeat").flatten().tolist() == [0, 1, 2, 4, 1, 2, 4, 1]
    assert more_rows(rows, 2, 1, "interpolate").flatten().tolist() == [0, 1, 1.5, 2, 3, 4]
    assert more_rows(rows, 2, 2, "repeat").flatten().tolist() == [0, 1, 2, 4, 2, 4]


@pytest.mark.parametrize("kind", BUCKETS)
@pytest.mark.parametrize("distance", [24, 200])
@pytest.mark.parametrize("resets", [True, False])
def test_distances_keep_their_biases_and_further_ones_have_the_furthest(kind: str, distance: int, resets: bool) -> None:
    fewer = PositionScheme(FEW, BUCKETS[kind](16, distance), resets)
    more = replace(fewer, positions=200)
    table = torch.arange(fewer.num_rows)
    longer = table[torch.tensor(more.rows_from(fewer))]
    known = dict(enumerate(table[fewer.distance_rows()].tolist(), -fewer.reach))
    wanted = [known[max(-fewer.reach, min(relative, fewer.reach))] for relative in range(-more.reach, more.reach + 1)]
    assert longer[more.distance_rows()].tolist() == wanted
    assert longer[more.cls_rows()].tolist() == table[fewer.cls_rows()].tolist()


@pytest.mark.parametrize(
    ("name", "how", "positions"),
    [
        ("COCO-LM's buckets, which reach further", "repeat", MANY),
        pytest.param("T5's, TUPE", "interpolate", MANY, marks=pytest.mark.long),
        pytest.param("no reset", "repeat", 4096, marks=pytest.mark.long),
    ],
)
def test_a_run_goes_on_with_many_times_as_many(tmp_path: Path, name: str, how: str, positions: int) -> None:
    """From a checkpoint of 48 positions, two steps of longer samples on two stages, exported: equal outputs."""
    run, longer = tmp_path / "run", tmp_path / "longer"
    tokenizer = write_tokenizer(run / "tokenizer")
    (before,) = run_ranks(save_trained, 1, config_of(FEW, SCHEMES[name], output=str(run)))
    longer.mkdir()
    given = {"initialize_from": [str(run)], "initialize_positions": how, "output": str(longer)}
    config = config_of(positions, SCHEMES[name], **given)
    initial = InitialWeights.open(config, tokenizer)
    initial.refuse_misfits()
    first = dict(initial.tensors)
    changed = {one for one, tensor in first.items() if tensor.shape != before[one].shape}
    assert changed == {one for one in before if one.endswith("position.weight")} and changed
    kept = {one for one in before if one not in changed and not one.endswith("table.weight")}
    assert all(first[one].equal(before[one]) for one in kept)

    spread = replace(config, parallel=replace(config.parallel, pipeline_model_parallel_size=2))
    weights = run_ranks(save_trained, 2, spread)[0]
    assert all((weights[one] - first[one])[2 * FEW].any() for one in changed), "no position was trained that is new"
    write_hf_folder(tmp_path / "hf", weights, config.model, tokenizer, {})
    probe = random_probe(config.model)
    (ours,) = run_ranks(trainer_outputs, 1, iteration_folder(longer, 2), config, *probe)
    differences = largest_differences(ours, hf_outputs(tmp_path / "hf", probe), probe.lengths)
    assert max(differences.values()) < 1e-5 and probe.masked_tokens.size(1) == positions


def test_more_positions_are_asked_for(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    config = config_of(FEW, {})
    (weights,) = run_ranks(save_trained, 1, config_of(FEW, {}, output=str(tmp_path)))
    write_hf_folder(tmp_path / "hf", weights, config.model, tokenizer, {})
    for positions, how in ((MANY, "same"), (FEW - 8, "repeat")):
        other = config_of(positions, {}, initialize_from=[str(tmp_path / "hf")], initialize_positions=how)
        with pytest.raises(UserError, match=f"model.max_position_embeddings is {positions}, .*/hf has 48") as caught:
            InitialWeights.open(other, tokenizer).refuse_misfits()
        assert ("repeat or interpolate" in str(caught.value)) == (how == "same")
