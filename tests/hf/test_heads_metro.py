"""Heads beside BERT's of transformers: the same call on the same logits gives the same loss or the same exception."""

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from metro_megatron.hf import modeling_metro
from metro_megatron.hf.configuration_metro import MODELS, MetroConfig
from metro_megatron.hf.export import metro_config
from tests.hf.pair import MODEL, VARIANTS, variant
from tools.citizen.bert import bert_call

S = 7
SMALL_BERT = transformers.BertConfig(
    vocab_size=MODEL.vocab_size, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=24
)
CLASSES = torch.tensor([2, 0, -100])
HOT = functional.one_hot(torch.tensor([2, 0, 1]), 3)
NUMBERS = torch.tensor([0.5, 2.0, -1.0])
MULTI, ONE, NUMBER = "multi_label_classification", "single_label_classification", "regression"
TOKENS = torch.arange(3 * S).view(3, S) % 4 - 1


def qa(*slots: int) -> dict[str, Tensor]:
    return {"start_positions": torch.tensor(slots), "end_positions": torch.tensor(slots).flip(0)}


# Class, num_labels, problem_type, and the labels of the call.
CALLS: list[tuple[str, int, str | None, dict[str, Tensor]]] = [
    ("SequenceClassification", 3, None, {"labels": CLASSES}),
    ("SequenceClassification", 3, None, {"labels": CLASSES[:, None]}),
    ("SequenceClassification", 3, None, {"labels": CLASSES.int()}),
    ("SequenceClassification", 3, ONE, {"labels": CLASSES}),
    ("SequenceClassification", 3, None, {"labels": HOT.float()}),
    ("SequenceClassification", 3, None, {"labels": HOT.bool()}),
    ("SequenceClassification", 3, MULTI, {"labels": HOT.float()}),
    ("SequenceClassification", 3, MULTI, {"labels": HOT}),
    ("SequenceClassification", 3, MULTI, {"labels": CLASSES}),
    ("SequenceClassification", 3, NUMBER, {"labels": HOT.float()}),
    ("SequenceClassification", 3, ONE, {"labels": NUMBERS}),
    ("SequenceClassification", 1, None, {"labels": NUMBERS}),
    ("SequenceClassification", 1, None, {"labels": NUMBERS[:, None]}),
    ("SequenceClassification", 1, None, {"labels": CLASSES}),
    ("SequenceClassification", 1, MULTI, {"labels": NUMBERS[:, None].sigmoid()}),
    ("SequenceClassification", 1, MULTI, {"labels": NUMBERS}),
    ("TokenClassification", 3, None, {"labels": TOKENS.clamp(min=0)}),
    ("TokenClassification", 3, None, {"labels": TOKENS.masked_fill(TOKENS < 0, -100)}),
    ("TokenClassification", 3, None, {"labels": torch.full((3, S), -100)}),
    ("TokenClassification", 3, None, {"labels": TOKENS.clamp(min=0)[:, 1:]}),
    ("MaskedLM", 3, None, {"labels": TOKENS.masked_fill(TOKENS < 0, -100)}),
    ("AuxiliaryMaskedLM", 3, None, {"labels": TOKENS.masked_fill(TOKENS < 0, -100)}),
    ("MultipleChoice", 3, None, {"labels": CLASSES[:1] - 1}),
    ("MultipleChoice", 3, None, {"labels": CLASSES[2:]}),
    ("QuestionAnswering", 2, None, qa(0, 3, 6)),
    ("QuestionAnswering", 2, None, {name: slots[:, None] for name, slots in qa(0, 3, 6).items()}),
    ("QuestionAnswering", 2, None, qa(0, 3, S)),
    ("QuestionAnswering", 2, None, qa(0, -1, 10**6)),
    ("QuestionAnswering", 2, None, qa(S, S + 1, S)),
    ("QuestionAnswering", 2, None, {"start_positions": torch.tensor([1, 2, 3])}),
]


def called(call: Any) -> Any:
    """A loss, its gradient being computable, or the kind of the exception."""
    try:
        loss = call().loss
        if loss is not None:
            loss.backward()
    except (ValueError, RuntimeError, IndexError) as error:
        return type(error)
    return None if loss is None else loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_call_as_berts(dtype: torch.dtype) -> None:
    ids = torch.arange(3 * S).view(3, S) + 5
    for kind, num_labels, problem_type, labels in CALLS:
        name = f"MetroFor{kind}"
        config = metro_config(MODEL)
        config.num_labels, config.problem_type = num_labels, problem_type
        torch.manual_seed(0)
        model = getattr(modeling_metro, name)(config).to(dtype).eval()
        rows = ids[None] if kind == "MultipleChoice" else ids
        said = model(rows)
        logits = torch.stack([said.start_logits, said.end_logits], -1) if "start_logits" in said else said.logits
        logits, settings = logits.detach().requires_grad_(), MetroConfig(**config.to_dict())
        expected = called(lambda: bert_call(name, logits, settings, {"input_ids": rows, **labels}))  # noqa: B023
        found = called(lambda: model(rows, **labels))  # noqa: B023
        case = f"{kind} {num_labels} {problem_type} {labels}"
        if isinstance(expected, float) and not math.isnan(expected):
            assert found == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 2e-2), case
        else:
            assert str(found) == str(expected), case
        if isinstance(expected, float):
            assert config.problem_type == settings.problem_type, case


def test_labels_out_of_range_are_named_with_their_limit() -> None:
    """torch speaks of an index, and on a GPU ends the process."""
    ids = torch.arange(3 * S).view(3, S) + 5
    config = metro_config(MODEL)
    config.num_labels = 3
    for kind, labels, words in (
        ("SequenceClassification", torch.tensor([0, 3, 1]), "labels hold 3, must be from 0 to 2 (num_labels is 3)"),
        ("TokenClassification", torch.full((3, S), -1), "labels hold -1, must be from 0 to 2"),
        ("MaskedLM", torch.full((3, S), 300), "labels hold 300, must be from 0 to 299 (vocab_size is 300)"),
        ("ReplacedTokenDetection", torch.full((3, S), 2), "labels hold 2, must be from 0 to 1"),
        ("PreTraining", torch.full((3, S), 300), "labels hold 300"),
        ("MultipleChoice", torch.tensor([3]), "labels hold 3, must be from 0 to 2 (the number of choices is 3)"),
    ):
        model = getattr(modeling_metro, f"MetroFor{kind}")(config)
        with pytest.raises(ValueError) as raised:
            model(ids[None] if kind == "MultipleChoice" else ids, labels=labels)
        assert words in str(raised.value)


def test_answers_where_none_can_be_are_ignored() -> None:
    """The logit there is the lowest finite one, whose loss would be 1e38."""
    torch.manual_seed(0)
    model = modeling_metro.MetroForQuestionAnswering(metro_config(MODEL)).eval()
    ids, mask = torch.arange(2 * S).view(2, S) + 5, torch.ones(2, S, dtype=torch.long)
    mask[1, :2] = 0  # on the left: <s> is at 2
    question = torch.zeros_like(ids)
    question[:, :4] = 1
    call = {"attention_mask": mask, "p_mask": question}
    found = model(ids, **call, start_positions=torch.tensor([5, 1]), end_positions=torch.tensor([3, 2]))
    assert (found.start_logits[1] > -100).tolist() == [False, False, True, False, True, True, True]
    one = functional.cross_entropy(found.start_logits[:1], torch.tensor([5]))
    other = functional.cross_entropy(found.end_logits[1:], torch.tensor([2]))
    assert float(found.loss) == pytest.approx(float(one + other) / 2, rel=1e-6)


@pytest.mark.parametrize("name", ["METRO", "METRO's baseline", "ELECTRA"])
def test_the_loss_of_the_pair_is_the_papers(name: str) -> None:
    torch.manual_seed(0)
    config = metro_config(variant(name))
    config.rtd_weight, config.clm_weight = 7.0, 3.0
    model = modeling_metro.MetroForPreTraining(config).double().eval()
    originals = torch.arange(3 * S).view(3, S) + 5
    mask = (torch.arange(S) < torch.tensor([S, 4, 2])[:, None]).long()
    is_masked = (originals % 3 == 0) & (mask == 1)
    labels = originals.masked_fill(~is_masked, -100)
    found = model(originals.masked_fill(is_masked, 4), mask, labels=labels)
    assert torch.equal(found.noised_input_ids[~is_masked], originals[~is_masked])
    expected = 0.0
    for logits, weight in ((found.mlm_logits, 1.0), (found.clm_logits, 3.0)):
        chance = logits[is_masked].softmax(-1)
        expected -= weight * chance[torch.arange(len(chance)), originals[is_masked]].log().mean()
    for row, column in mask.nonzero().tolist():
        same = found.noised_input_ids[row, column] == originals[row, column]
        chance = found.rtd_logits[row, column].sigmoid()
        expected -= 7.0 * (chance if same else 1 - chance).log() / mask.sum()
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)
    found.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_pair_has_no_loss_of_what_it_cannot_compute() -> None:
    model = modeling_metro.MetroForPreTraining(metro_config(MODEL, ["rtd", "scl"]))
    ids = torch.arange(S)[None] + 5
    with pytest.raises(ValueError, match="this model learned scl, whose loss needs more"):
        model(ids, labels=ids)


def test_the_pair_takes_arguments_in_the_order_of_berts() -> None:
    kind = modeling_metro.MetroForPreTraining
    names = [list(inspect.signature(one.forward).parameters) for one in (kind, transformers.BertForPreTraining)]
    assert names[0][:7] == names[1][:7]
    torch.manual_seed(0)
    model = kind(metro_config(MODEL)).eval()
    model.set_attn_implementation("eager")
    ids = torch.arange(3 * S).view(3, S) + 5
    mask, places = (ids < 20).long(), torch.arange(S)[None]
    labels = ids.masked_fill(ids % 3 > 0, -100)
    noised = ids.flip(1)
    given = {"noised_input_ids": noised, "output_hidden_states": True, "output_attentions": True}
    found = model(ids, mask, torch.ones_like(ids), places, None, labels, **given)
    named = model(ids, attention_mask=mask, position_ids=places, labels=labels, noised_input_ids=noised)
    assert torch.equal(found.loss, named.loss) and named.hidden_states is None
    main = model.metro(noised, mask, position_ids=places, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert all(map(torch.equal, found[name], main[name])) and len(found[name]) >= MODEL.num_layers
    for wrong in ({"inputs_embeds": torch.zeros(3, S, MODEL.hidden_size)}, {}):
        with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
            model(attention_mask=mask, **wrong)


@pytest.mark.parametrize("name", MODELS.values())
def test_tuples_are_given_where_config_or_call_ask_for_them(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(modeling_metro, name)(metro_config(MODEL)).eval()
    ids = torch.arange(3 * S).view(3, S) + 5
    call = {"input_ids": ids[None] if name == "MetroForMultipleChoice" else ids}
    if name == "MetroForPreTraining":
        call["noised_input_ids"] = ids
    expected = model(**call).to_tuple()
    answers = [model(**call, return_dict=False)]
    model.config.return_dict = False
    answers += [model(**call), model(**call, return_dict=True).to_tuple()]
    for answer in answers:
        assert isinstance(answer, tuple)
        assert all(map(torch.equal, answer, expected)) and len(answer) == len(expected)


@pytest.mark.parametrize("mode", ["meta", "fake"])
@pytest.mark.parametrize("name", ["MaskedLM", "AuxiliaryMaskedLM", "TokenClassification", "SequenceClassification"])
def test_calls_without_numbers_have_shapes_as_berts(name: str, mode: str) -> None:
    device = torch.device("meta") if mode == "meta" else FakeTensorMode()
    with device:
        model = getattr(modeling_metro, f"MetroFor{name}")(metro_config(MODEL))
        bert = getattr(transformers, f"BertFor{name.removeprefix('Auxiliary')}")(SMALL_BERT)
        ids = torch.ones(3, S, dtype=torch.long)
        labels = ids[:, 0] if name == "SequenceClassification" else ids
        call = {"position_ids": torch.arange(S)[None], "labels": labels}
        found, expected = model(ids, **call), bert(ids, **call)
        assert found.logits.shape == expected.logits.shape and found.loss.shape == expected.loss.shape
        assert model(ids, ids, labels=labels).loss.shape == found.loss.shape


@pytest.mark.parametrize("name", MODELS.values())
def test_every_class_computes_shapes_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = getattr(modeling_metro, name)(metro_config(MODEL))
        ids = torch.ones(2, 3, S) if name == "MetroForMultipleChoice" else torch.ones(3, S)
        call = {"input_ids": ids.long(), "attention_mask": ids.long()}
        of_rows = "SequenceClassification" in name or "MultipleChoice" in name
        if "QuestionAnswering" in name:
            call |= dict.fromkeys(("start_positions", "end_positions"), torch.ones(3, dtype=torch.long))
            call["p_mask"] = call["input_ids"]
        elif name != "MetroModel":
            call["labels"] = torch.ones(len(ids), dtype=torch.long) if of_rows else call["input_ids"]
        assert (model(**call).last_hidden_state if name == "MetroModel" else model(**call).loss).is_meta


def detection_call() -> tuple[dict[str, Tensor], Tensor]:
    """A call of padded rows, without labels, and the labels of detection."""
    ids = torch.arange(3 * S).view(3, S) + 5
    mask = (torch.arange(S) < torch.tensor([S, 4, 2])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}, (ids % 3 > 0).long().masked_fill(ids % 5 == 0, -100)


def test_detection_averages_over_labelled_tokens() -> None:
    call, labels = detection_call()
    logits = torch.randn(3, S, requires_grad=True)
    found = modeling_metro.detection_loss(logits, labels, call["attention_mask"])
    is_asked = (labels != -100) & (call["attention_mask"] == 1)
    expected = functional.binary_cross_entropy_with_logits(logits[is_asked], labels[is_asked].float())
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    nothing = modeling_metro.detection_loss(logits, torch.full_like(labels, -100), None)
    assert nothing.isnan(), "as torch's mean of nothing"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ReplacedTokenDetection", "PreTraining"])
def test_losses_over_some_tokens_are_one_graph(kind: str) -> None:
    """Which tokens these are decides no shape: torch.compile's graph is whole, and torch.export's of any length."""
    torch.manual_seed(0)
    small = metro_config(replace(MODEL, num_layers=1, auxiliary_num_layers=1))
    model = getattr(modeling_metro, f"MetroFor{kind}")(small).eval()
    call, labels = detection_call()
    if kind == "PreTraining":
        labels = call["input_ids"].masked_fill(labels != 1, -100)
        call["noised_input_ids"] = call["input_ids"].flip(1)
    call["labels"] = labels
    expected = model(**call)
    shape = {0: torch.export.Dim("rows"), 1: torch.export.Dim("length", max=MODEL.max_position_embeddings)}
    longer = {name: torch.cat([value, value], 1) for name, value in call.items()}
    program = torch.export.export(model, (), longer, dynamic_shapes=dict.fromkeys(call, shape), strict=False)
    torch.testing.assert_close(program.module()(**call).loss, expected.loss)
    call.pop("noised_input_ids", None)  # the auxiliary samples
    found = torch.compile(model, fullgraph=True, backend="eager")(**call)
    if kind == "ReplacedTokenDetection":
        torch.testing.assert_close(found.loss, expected.loss)
    else:
        assert found.noised_input_ids[labels == -100].equal(call["input_ids"][labels == -100])
        assert found.loss.isfinite()


def test_words_are_drawn_as_often_as_the_auxiliary_says() -> None:
    torch.manual_seed(0)
    logits, never = torch.randn(8) * 2, [0, 3]
    drawn = modeling_metro.sampled_words(logits.expand(200, 500, 8), never)
    chances = logits.index_fill(0, torch.tensor(never), -torch.inf).softmax(0)
    frequencies = drawn.flatten().bincount(minlength=8) / drawn.numel()
    # Five standard errors of 100,000 draws.
    assert ((frequencies - chances).abs() <= 5 * (chances * (1 - chances) / drawn.numel()).sqrt()).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_resized_embeddings_keep_every_decoder(name: str) -> None:
    """Old logits are kept, and what was tied is."""
    config = metro_config(variant(name))
    ids = torch.arange(3 * S).view(3, S) + 5
    for kind in ("MaskedLM", "AuxiliaryMaskedLM", "PreTraining"):
        torch.manual_seed(0)
        model = getattr(modeling_metro, f"MetroFor{kind}")(MetroConfig(**config.to_dict())).eval()
        others = {"noised_input_ids": ids} if kind == "PreTraining" else {}
        before = model(ids, **others)
        model.resize_token_embeddings(311)
        after = model(ids, **others)
        for output in ("logits", "mlm_logits", "clm_logits"):
            if output in before:
                assert after[output].size(-1) == 311
                torch.testing.assert_close(after[output][..., :300], before[output])
        for head, tied in model._tied_weights_keys.items():
            assert model.get_parameter(head) is model.get_parameter(tied), head


@pytest.mark.parametrize("name", MODELS.values())
def test_every_class_saves_a_folder_that_loads_as_it(
    name: str, export_folder: Path, tmp_path: Path, remote_code: None
) -> None:
    kind = getattr(modeling_metro, name)
    kind.from_pretrained(export_folder).save_pretrained(tmp_path / "first")
    moved = (tmp_path / "first").rename(tmp_path / name)  # transformers keeps the code of folders by their names
    auto = getattr(transformers, kind._auto_class)
    model, report = auto.from_pretrained(moved, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == name and type(model).__module__.startswith("transformers_modules.")
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    model.save_pretrained(tmp_path / "again")  # by the folder's own code
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in moved.iterdir()}


def test_masks_are_warned_of_once_where_main_never_saw_them(caplog: pytest.LogCaptureFixture) -> None:
    transformers.utils.logging.warning_once.cache_clear()  # another test may have met it
    transformers.utils.logging.enable_propagation()
    ids = torch.arange(S)[None] + 5
    corrects = modeling_metro.MetroForMaskedLM(metro_config(MODEL))
    fills = modeling_metro.MetroForMaskedLM(metro_config(MODEL, ["mlm"]))
    try:
        corrects(ids), fills(ids - 3)
        assert not caplog.records
        corrects(ids - 3), corrects(ids - 3)
    finally:
        transformers.utils.logging.disable_propagation()
    (record,) = caplog.records
    assert "<mask>" in record.getMessage() and "MetroForAuxiliaryMaskedLM" in record.getMessage()
