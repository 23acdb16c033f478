"""The table of the trainer's tensors and exported ones, read in both directions."""

import pytest
import torch
from torch import Tensor

from metro_megatron.errors import UserError
from metro_megatron.hf.weights import TrainerTensors, hf_state_dict, hf_tensors
from tests.hf.pair import MODEL, VARIANTS, VOCAB_SIZE, trainer_tensors, variant

OBJECTIVES = ("rtd", "clm")


def as_trained(name: str) -> dict[str, Tensor]:
    """Rows that only pad the vocabulary are 0 in every run."""
    tensors = trainer_tensors(variant(name))
    for key, tensor in tensors.items():
        if key.endswith(("word.weight", "decoder.bias")):
            tensor[VOCAB_SIZE:] = 0
    return tensors


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_every_tensor_is_bit_equal(name: str) -> None:
    model, tensors = variant(name), as_trained(name)
    state = hf_state_dict(tensors, model)
    for exported in (state, hf_tensors(tensors, model, OBJECTIVES)):
        back = TrainerTensors(exported, model, OBJECTIVES)
        assert set(back) == tensors.keys() and not back.unread and not list(back.unequal_ties())
        assert all(back[key].equal(tensor) for key, tensor in tensors.items())
    lazy = hf_tensors(tensors, model, OBJECTIVES)
    assert all(lazy[key].equal(state[key]) for key in lazy)


def test_what_is_not_there_or_of_another_shape_is_not_made_up() -> None:
    state = hf_state_dict(trainer_tensors(), MODEL)
    del state["auxiliary.encoder.layer.1.attention.key.bias"]
    state["rtd_head.weight"] = torch.zeros(1, 23)
    back = TrainerTensors(state, MODEL, OBJECTIVES)
    assert back.origins.keys() - set(back) == {"aux.block.layers.1.self_attention.linear_qkv.bias"}
    with pytest.raises(UserError, match=r"rtd_head.weight has shape \(1, 23\), the configuration gives \(1, 24\)"):
        back["main.rtd_head.weight"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_no_number_is_refused_both_ways(value: str) -> None:
    tensors = trainer_tensors()
    state = hf_state_dict(tensors, MODEL)
    word = "metro.embeddings.word_embeddings.weight"
    damaged = state[word].index_fill(1, torch.tensor(3), float(value))
    state = {name: damaged if tensor is state[word] else tensor for name, tensor in state.items()}
    back = TrainerTensors(state, MODEL, OBJECTIVES)
    assert not list(back.unequal_ties()), "one damage, not two tensors of other values"
    with pytest.raises(UserError, match=rf"tensor {word}: {len(damaged)} of its values are no finite numbers"):
        back["tied.word.weight"]
    tensors["main.rtd_head.weight"][0, 0] = float(value)
    with pytest.raises(UserError, match=r"tensor main.rtd_head.weight: 1 of its values are no finite"):
        hf_tensors(tensors, MODEL, OBJECTIVES)["rtd_head.weight"]


def test_one_tensor_of_two_values_is_named() -> None:
    state = hf_state_dict(trainer_tensors(), MODEL)
    state["clm_head.decoder.weight"] = state["clm_head.decoder.weight"] + 1
    pairs = list(TrainerTensors(state, MODEL, OBJECTIVES).unequal_ties())
    assert ("metro.embeddings.word_embeddings.weight", "clm_head.decoder.weight") in pairs
