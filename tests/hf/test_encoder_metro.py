"""Rows of the exported encoders: padding on either side, packed samples, masks of pairs, weights that lie elsewhere."""

from pathlib import Path

import accelerate
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from metro_megatron.hf.export import metro_config
from metro_megatron.hf.modeling_metro import (
    MetroForAuxiliaryMaskedLM,
    MetroForPreTraining,
    MetroForSequenceClassification,
    MetroModel,
)
from tests.hf.pair import MODEL, VARIANTS, variant, write_export

LENGTHS = (12, 1, 7)


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, MODEL.vocab_size, (length,), generator=generator) for length in LENGTHS]


def padded(side: str, empty: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask [3 + empty, 15]: the longest row has padding, too; empty rows have nothing else."""
    rows = [*samples(), *(torch.empty(0, dtype=torch.long) for _ in range(empty)), torch.zeros(15, dtype=torch.long)]
    ids = pad_sequence(rows, batch_first=True, padding_value=1, padding_side=side)[:-1]
    return ids, (ids != 1).long()


def packed() -> tuple[Tensor, Tensor]:
    """Ids and position_ids [1, 20] of all samples in one row."""
    return torch.cat(samples())[None], torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_their_samples_however_they_stand(name: str) -> None:
    """Main and auxiliary; on the left as on the right bit by bit, with hidden states and attentions of all layers."""
    torch.manual_seed(0)
    pair = MetroForPreTraining(metro_config(variant(name))).double().eval()
    pair.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    words = pair.metro.embeddings.word_embeddings
    tables = {pair.metro: words, pair.auxiliary: getattr(pair.auxiliary.embeddings, "word_embeddings", words)}
    for encoder, table in tables.items():
        options = {"output_hidden_states": True, "output_attentions": True}
        alone = [encoder(inputs_embeds=table(ids[None])).last_hidden_state[0] for ids in samples()]
        (ids, mask), (left_ids, left_mask) = padded("right"), padded("left")
        right = encoder(inputs_embeds=table(ids), attention_mask=mask, **options)
        left = encoder(inputs_embeds=table(left_ids), attention_mask=left_mask, **options)
        real, left_real = mask.bool(), left_mask.bool()
        torch.testing.assert_close(right.last_hidden_state[real], torch.cat(alone), rtol=0, atol=1e-12)
        for one, other in zip(right.hidden_states, left.hidden_states, strict=True):
            assert torch.equal(one[real], other[left_real])
        for one, other in zip(right.attentions, left.attentions, strict=True):
            for row, length in enumerate(LENGTHS):
                assert torch.equal(one[row, :, :length, :length], other[row, :, -length:, -length:])
        ids, position_ids = (rows.repeat(1, 3) for rows in packed())  # 60 slots, of a model of 40 positions
        row = encoder(inputs_embeds=table(ids), position_ids=position_ids)
        torch.testing.assert_close(row.last_hidden_state[0], torch.cat(alone * 3), rtol=0, atol=1e-12)


def test_masks_of_pairs_and_positions_say_the_same() -> None:
    torch.manual_seed(0)
    model = MetroModel(metro_config(MODEL)).double().eval()
    ids, position_ids = packed()
    expected = model(ids, position_ids=position_ids).last_hidden_state
    sample = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    sees = (sample[:, None] == sample[None, :])[None]
    added = torch.zeros(1, 1, *sees.shape[1:], dtype=torch.float64).masked_fill(~sees, -torch.inf)
    for mask in (sees, sees.long(), sees[:, None], added, torch.ones_like(ids)):
        assert torch.equal(model(ids, mask, position_ids=position_ids).last_hidden_state, expected)
    # Without restarts nothing is packed, and positions that are given are positions.
    plain = torch.arange(ids.size(1))[None]
    assert torch.equal(model(ids, position_ids=plain).last_hidden_state, model(ids).last_hidden_state)
    ids, mask = padded("left")
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    found, turned = (model(ids, mask, position_ids=given).last_hidden_state for given in (position_ids, None))
    torch.testing.assert_close(found[mask.bool()], turned[mask.bool()], rtol=0, atol=1e-12)


def test_masks_of_floats_are_added_in_both_their_shapes() -> None:
    torch.manual_seed(0)
    model = MetroModel(metro_config(MODEL)).double().eval()
    ids, mask = padded("right")
    seen = mask.bool()[:, None, :] & torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).tril()
    expected = model(ids, seen).last_hidden_state
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    for pairs in (added, added[:, None]):
        torch.testing.assert_close(model(ids, pairs).last_hidden_state, expected, rtol=0, atol=1e-12)
    keys = mask.bool()[:, None, None]  # as BERT takes them: all queries see the same
    expected = model(ids, mask).last_hidden_state[mask.bool()]
    for pairs in (keys, torch.zeros(keys.shape).masked_fill(~keys, torch.finfo(torch.float32).min)):
        found = model(ids, pairs).last_hidden_state[mask.bool()]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_row_without_tokens_is_finite(attention: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = MetroForSequenceClassification(metro_config(MODEL)).to(dtype).eval()
    model.set_attn_implementation(attention)
    ids, mask = padded("left", empty=1)
    with torch.no_grad():
        found = model(ids, mask, output_hidden_states=True)
        others = model(ids[:-1], mask[:-1])
    assert all(states.isfinite().all() for states in (*found.hidden_states, found.logits))
    torch.testing.assert_close(found.logits[:-1], others.logits)


def test_mistakes_of_rows_are_said() -> None:
    model = MetroModel(metro_config(MODEL))
    ids, position_ids = packed()
    with pytest.raises(ValueError, match="position_ids are from 29 to 40, the model has positions 0 to 39"):
        model(ids, position_ids=position_ids + 29)
    with pytest.raises(ValueError, match=r"position_ids are \(20,\), must be \(1, 20\)"):
        model(ids, position_ids=position_ids[0])
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 20, 19\), must be \(1, 20\), or of pairs"):
        model(ids, attention_mask=torch.ones(1, 20, 19))


@pytest.mark.parametrize(
    "name", ["METRO", "ELECTRA", "nothing shared, TUPE without relative positions or reset, pre-LN"]
)
def test_weights_are_read_through_their_modules(name: str, tmp_path: Path) -> None:
    """Offloaded ones come when a module is called, and lie on the meta device else."""
    folder = write_export(tmp_path, variant(name))
    ids, mask = padded("right")
    for kind in (MetroForPreTraining, MetroForAuxiliaryMaskedLM, MetroModel):
        others = {"noised_input_ids": ids} if kind is MetroForPreTraining else {}
        expected = kind.from_pretrained(folder).eval()(ids, mask, **others)
        model = kind.from_pretrained(folder).eval()
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        for found, value in zip(model(ids, mask, **others).to_tuple(), expected.to_tuple(), strict=True):
            torch.testing.assert_close(found, value)


@pytest.mark.parametrize(
    "name", ["METRO", *(pytest.param(name, marks=pytest.mark.long) for name in ("TUPE", "ELECTRA"))]
)
def test_an_export_computes_rows_of_other_shapes(name: str) -> None:
    """By torch.export and its decompositions, which ONNX begins with; the attention is the default one."""
    torch.manual_seed(0)
    model = MetroForSequenceClassification(metro_config(variant(name))).eval()
    assert model.config._attn_implementation == "sdpa"
    ids, mask = padded("right")
    shape = {0: torch.export.Dim("rows"), 1: torch.export.Dim("length", max=MODEL.max_position_embeddings)}
    call = {"input_ids": ids, "attention_mask": mask}
    program = torch.export.export(model, (), call, dynamic_shapes=dict.fromkeys(call, shape), strict=False)
    exported = program.run_decompositions().module()
    for side, width in (("right", 20), ("left", 15)):
        ids, mask = (functional.pad(rows, (0, width - 15)).repeat(2, 1) for rows in padded(side))
        torch.testing.assert_close(exported(input_ids=ids, attention_mask=mask).logits, model(ids, mask).logits)
