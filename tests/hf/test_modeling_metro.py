"""The modeling file against the recipe written down a second time, its exact figures, and every class."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.export import metro_config
from metro_megatron.hf.modeling_metro import (
    MetroForAuxiliaryMaskedLM,
    MetroForMaskedLM,
    MetroForMultipleChoice,
    MetroForPreTraining,
    MetroForQuestionAnswering,
    MetroForReplacedTokenDetection,
    MetroForSequenceClassification,
    MetroForTokenClassification,
    MetroModel,
)
from metro_megatron.hf.positions_metro import distance_buckets, relative_buckets
from metro_megatron.hf.weights import hf_state_dict
from tests.hf import reference
from tests.hf.pair import MODEL, VARIANTS, trainer_tensors, variant

# First distance of every bucket of a side, for 512 positions.
STARTS = {
    ("t5", 32, 128): [*range(9), 12, 16, 23, 32, 46, 64, 91],
    ("coco", 32, 128): [*range(10), 12, 18, 27, 39, 58, 86],
    ("t5", 64, 128): [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113],
    ("coco", 64, 128): [*range(18), 19, 22, 25, 28, 32, 37, 43, 49, 56, 64, 74, 84, 97, 111],
}
LENGTHS = (40, 17, 1)


def pair(
    model: ModelConfig = MODEL, attention: str = "eager", dtype: torch.dtype = torch.float64
) -> MetroForPreTraining:
    config = metro_config(model)
    config._attn_implementation = attention
    built = MetroForPreTraining(config)
    built.load_state_dict(hf_state_dict(trainer_tensors(model), model))
    built.tie_weights()
    return built.to(dtype).eval()


def random_rows(seed: int) -> tuple[Tensor, Tensor]:
    """Ids [B, S] with random ids behind the ends of the rows too, and the attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, MODEL.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask


@pytest.mark.parametrize(("kind", "buckets", "distance"), STARTS)
def test_bucket_starts(kind: str, buckets: int, distance: int) -> None:
    config = MetroConfig(
        relative_bucket=kind, relative_attention_num_buckets=buckets, relative_attention_max_distance=distance
    )
    ids = distance_buckets(config).tolist()
    zero = 511
    later, earlier = ids[zero:], ids[zero::-1]
    starts = [0, *(n for n in range(1, 512) if later[n] != later[n - 1])]
    assert starts == STARTS[kind, buckets, distance]
    assert starts == [0, *(n for n in range(1, 512) if earlier[n] != earlier[n - 1])]
    assert len(set(ids)) == buckets - 1, "one row is left for [CLS]"
    half = buckets // 2
    if kind == "coco":
        assert ids == sorted(ids)
        assert set(ids) == set(range(buckets - 1))
        assert later[0] == half - 1
    else:
        assert later[0] == 0
        assert set(earlier) == set(range(half))
        assert set(later[1:]) == set(range(half + 1, buckets))


@pytest.mark.parametrize(("kind", "unused"), [("coco", 511), ("t5", 256)])
def test_cls_is_reset_and_a_short_sample_keeps_the_ids_of_a_long_one(kind: str, unused: int) -> None:
    config = MetroConfig(relative_bucket=kind, relative_attention_num_buckets=512, relative_attention_max_distance=512)
    long = relative_buckets(config, 512, torch.device("cpu"))
    assert long[0].unique().tolist() == [unused]
    assert long[1:, 0].unique().tolist() == [512]
    assert unused not in long[1:, 1:]
    assert torch.equal(relative_buckets(config, 128, torch.device("cpu")), long[:128, :128])


SIZES = {
    "base": ({}, 183_753_996, 29_467_148),
    "large": ({"H": 1024, "A": 16, "L": 24, "La": 6, "b": 128}, 433_909_776, 77_285_392),
    "xl": ({"H": 1536, "A": 24, "L": 48, "La": 8, "b": 512}, 1_557_322_776, 229_945_880),
    "xxl": ({"H": 2560, "A": 40, "L": 64, "La": 8, "b": 512}, 5_364_311_080, 637_437_480),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size: str) -> None:
    letters, main, auxiliary = SIZES[size]
    names = {
        "H": "hidden_size",
        "A": "num_attention_heads",
        "L": "num_hidden_layers",
        "La": "num_auxiliary_layers",
        "b": "relative_attention_num_buckets",
    }
    config = MetroConfig(
        **{names[letter]: value for letter, value in letters.items()}, intermediate_size=4 * letters.get("H", 768)
    )
    with torch.device("meta"):
        built = MetroForPreTraining(config)
    heads = 2 * config.vocab_size - config.vocab_size + config.hidden_size + 1  # CLM bias and RTD head
    assert sum(p.numel() for p in built.metro.parameters()) == main
    assert sum(p.numel() for p in built.parameters()) == main + auxiliary + heads


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_and_gradients_equal_the_recipe(attention: str, name: str) -> None:
    model = variant(name)
    built = pair(model, attention)
    (masked, mask), (noised, _) = random_rows(1), random_rows(2)
    ours = built(masked, attention_mask=mask, noised_input_ids=noised)
    tensors = {name: tensor.double().requires_grad_() for name, tensor in trainer_tensors(model).items()}
    generator = torch.Generator().manual_seed(3)
    our_sum, their_sum = torch.zeros(()), torch.zeros(())
    for row, length in enumerate(LENGTHS):
        theirs = reference.outputs(masked[row, :length].tolist(), noised[row, :length].tolist(), tensors, model)
        for name, expected in theirs.items():
            found = ours["last_hidden_state" if name == "hidden" else f"{name}_logits"][row, :length]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
            weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
            our_sum, their_sum = our_sum + (found * weight).sum(), their_sum + (expected * weight).sum()
    our_sum.backward()
    their_sum.backward()
    expected = hf_state_dict({name: tensor.grad for name, tensor in tensors.items()}, model)
    for name, parameter in built.named_parameters():
        torch.testing.assert_close(parameter.grad.float(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_gradcheck_through_one_layer() -> None:
    torch.manual_seed(0)
    layer = pair().metro.encoder.layer[0]
    hidden = torch.randn(2, 3, MODEL.hidden_size, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, MODEL.num_attention_heads, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, b: layer(h, b, False)[0], (hidden, bias))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_nothing(attention: str) -> None:
    built = pair(attention=attention).metro
    ids, mask = random_rows(4)
    padded = built(ids, attention_mask=mask).last_hidden_state
    for row, length in enumerate(LENGTHS):
        alone = built(ids[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(padded[row, :length], alone, rtol=0, atol=1e-12)


def test_bf16_softmax_is_computed_in_fp32() -> None:
    exact, half = pair().metro, pair(dtype=torch.bfloat16).metro
    ids, mask = random_rows(5)
    found = half(ids, attention_mask=mask, output_attentions=True)
    assert found.last_hidden_state.dtype == torch.bfloat16
    assert found.last_hidden_state.isfinite().all()
    expected = exact(ids, attention_mask=mask).last_hidden_state
    assert (found.last_hidden_state.double() - expected)[mask.bool()].abs().mean() < 0.05


def test_dropout_is_mains_alone() -> None:
    built = pair().train()
    ids, mask = random_rows(6)
    runs = [built(ids, attention_mask=mask, noised_input_ids=ids) for _ in range(2)]
    assert torch.equal(runs[0].mlm_logits, runs[1].mlm_logits)
    assert not torch.equal(runs[0].clm_logits, runs[1].clm_logits)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    ids, mask = random_rows(7)
    gradients = []
    for is_on in (False, True):
        built = pair(replace(MODEL, hidden_dropout=0.0, attention_dropout=0.0)).train()
        if is_on:
            built.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            assert built.metro.encoder.layer[0].gradient_checkpointing
        built.metro(ids, attention_mask=mask).last_hidden_state.square().sum().backward()
        gradients.append(built.metro.encoder.relative_attention_bias.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_masks_are_sampled_from_the_auxiliary_when_no_noised_ids_are_given() -> None:
    built = pair()
    ids, mask = random_rows(8)
    ids = ids.masked_fill(ids == 4, 5)
    ids[0, 3:20] = 4
    torch.manual_seed(0)
    noised = built(ids, attention_mask=mask).noised_input_ids
    assert torch.equal(noised[ids != 4], ids[ids != 4])
    assert (noised[0, 3:20] != 4).sum() > 10
    with torch.no_grad():
        built.auxiliary_head.decoder.bias[77] += 1e4
    assert (built(ids, attention_mask=mask).noised_input_ids[0, 3:20] == 77).all()


@pytest.mark.parametrize("targets", ["ffn", "ffn_out", "residual_out", "none"])
def test_initial_weights(targets: str) -> None:
    torch.manual_seed(0)
    config = MetroConfig(
        vocab_size=600,
        hidden_size=192,
        intermediate_size=384,
        num_attention_heads=3,
        num_hidden_layers=3,
        num_auxiliary_layers=1,
        scaled_init_targets=targets,
    )
    built = MetroModel(config)
    scaled = {"ffn": ("intermediate", "output"), "ffn_out": ("output",), "residual_out": ("output", "attention.output")}
    for index, layer in enumerate(built.encoder.layer):
        for name in (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.output",
            "intermediate",
            "output",
        ):
            linear = layer.get_submodule(name)
            divisor = (2 * (index + 1)) ** 0.5 if name in scaled.get(targets, ()) else 1.0
            assert linear.weight.std().item() == pytest.approx(0.02 / divisor, rel=0.03)
            assert not linear.bias.any()
        assert (layer.output_norm.weight == 1).all()
    words = built.embeddings.word_embeddings.weight
    assert words.std().item() == pytest.approx(0.02, rel=0.03)
    assert not words[config.pad_token_id].any()


@pytest.mark.parametrize(("attention", "model"), [("eager", MODEL), ("sdpa", MODEL), ("eager", variant("ELECTRA"))])
def test_every_head_has_loss_and_gradients(attention: str, model: ModelConfig) -> None:
    torch.manual_seed(0)
    config = metro_config(model)
    config._attn_implementation = attention
    config.num_labels = 3
    ids, mask = random_rows(9)
    tokens = torch.where(mask == 1, ids % 3, -100)
    ends = torch.tensor(LENGTHS) - 1
    cases = [
        (MetroForMaskedLM, {"labels": torch.where(mask == 1, ids, -100)}, (3, 40, MODEL.vocab_size)),
        (MetroForAuxiliaryMaskedLM, {"labels": torch.where(mask == 1, ids, -100)}, (3, 40, MODEL.vocab_size)),
        (MetroForReplacedTokenDetection, {"labels": torch.where(mask == 1, ids % 2, -100)}, (3, 40)),
        (MetroForSequenceClassification, {"labels": torch.tensor([0, 2, 1])}, (3, 3)),
        (MetroForTokenClassification, {"labels": tokens}, (3, 40, 3)),
        (MetroForQuestionAnswering, {"start_positions": ends // 2, "end_positions": ends}, (3, 40)),
    ]
    for kind, labels, shape in cases:
        built = kind(config).train()
        outputs = built(input_ids=ids, attention_mask=mask, **labels)
        logits = outputs.start_logits if "start_positions" in labels else outputs.logits
        assert logits.shape == shape
        outputs.loss.backward()
        silent = [name for name, parameter in built.named_parameters() if parameter.grad is None]
        assert not silent, f"{kind.__name__}: no gradient for {silent}"
        as_tuple = built.eval()(input_ids=ids, attention_mask=mask, return_dict=False)
        assert isinstance(as_tuple, tuple)


def test_losses_are_means_over_what_is_labelled() -> None:
    ids, mask = random_rows(10)
    config = metro_config(MODEL)
    built = MetroForReplacedTokenDetection(config).eval()
    labels = torch.where(mask == 1, ids % 2, -100)
    outputs = built(ids, mask, labels=labels)
    chosen = labels != -100
    chance = outputs.logits[chosen].sigmoid()
    expected = -torch.where(labels[chosen] == 1, chance, 1 - chance).log().mean()
    torch.testing.assert_close(outputs.loss, expected)

    config.num_labels = 1
    regressor = MetroForSequenceClassification(config).eval()
    outputs = regressor(ids, mask, labels=torch.tensor([0.5, 2.0, -1.0]))
    expected = (outputs.logits[:, 0] - torch.tensor([0.5, 2.0, -1.0])).square().mean()
    torch.testing.assert_close(outputs.loss, expected)


def test_answers_are_not_found_in_padding_or_question() -> None:
    built = MetroForQuestionAnswering(metro_config(MODEL)).eval()
    ids, mask = random_rows(11)
    question = torch.zeros_like(mask)
    question[:, :6] = 1
    outputs = built(ids, mask, p_mask=question)
    possible = (mask == 1) & (question == 0)
    possible[:, 0] = True
    for logits in (outputs.start_logits, outputs.end_logits):
        assert (logits[~possible] == torch.finfo(torch.float32).min).all()
        assert logits[possible].abs().max() < 100


def test_mistakes_are_said() -> None:
    built = pair().metro
    ids, mask = random_rows(12)
    with pytest.raises(ValueError, match="41 tokens, the model has 40 positions"):
        built(torch.cat([ids, ids[:, :1]], 1))
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 39\)"):
        built(ids, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        built(ids, inputs_embeds=torch.zeros(3, 40, MODEL.hidden_size))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        MetroForMultipleChoice(metro_config(MODEL))()
    with pytest.raises(ValueError, match="not a multiple"):
        MetroConfig(hidden_size=770)
    with pytest.raises(
        ValueError, match="auxiliary_hidden_size 100 is not a multiple of auxiliary_num_attention_heads"
    ):
        MetroConfig(auxiliary_hidden_size=100)
    with pytest.raises(ValueError, match="lm_head is 'deep'"):
        MetroConfig(lm_head="deep")
    with pytest.raises(ValueError, match="width 128, which cannot read hidden_size 768; choose lm_head 'dense'"):
        MetroForMaskedLM(MetroConfig(embedding_size=128))
    with pytest.raises(ValueError, match="'bert'"):
        MetroConfig(relative_bucket="bert")
    with pytest.raises(ValueError, match="'norm'"):
        MetroConfig(shared_embeddings="norm")
    with pytest.raises(ValueError, match="'token_position', but with untied_positions"):
        MetroConfig(shared_embeddings="token_position", untied_positions=True)
