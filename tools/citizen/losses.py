"""Checks of heads: the same call of BERT's head on the same logits gives the same loss, or the same exception."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional

from metro_megatron.hf.modeling_metro import MetroForAuxiliaryMaskedLM, MetroForReplacedTokenDetection
from tools.citizen.bert import bert_call
from tools.citizen.subject import NUM_LABELS, Checks, Subject, close, raises, require

LABELS = torch.tensor([0, 2, 1])
FLOATS = torch.tensor([0.5, 2.0, -1.0])


def sequence_classification(subject: Subject) -> str:
    """Every problem type, said or found out by the labels."""
    hot = functional.one_hot(LABELS, NUM_LABELS).float()
    calls = [
        (NUM_LABELS, None, LABELS),
        (NUM_LABELS, None, hot),
        (NUM_LABELS, "multi_label_classification", hot),
        (NUM_LABELS, "regression", hot),
        (1, None, FLOATS),
        (1, "multi_label_classification", FLOATS[:, None].sigmoid()),
    ]
    for num_labels, problem_type, labels in calls:
        model = subject.classifier(num_labels=num_labels, problem_type=problem_type)
        settings = copy.deepcopy(model.config)
        found = model(**subject.rows(), labels=labels)
        expected = bert_call(type(model).__name__, found.logits, settings, {"labels": labels})
        close(found.loss, expected.loss)
        require(model.config.problem_type == settings.problem_type, f"sets {model.config.problem_type}")
    return f"{len(calls)} calls as BERT's"


def token_labels(subject: Subject) -> tuple[dict[str, Tensor], Tensor]:
    """Rows, and labels of their tokens with -100 at padding and specials."""
    rows = subject.rows()
    labels = rows["input_ids"] % NUM_LABELS
    specials = torch.tensor(subject.tokenizer.all_special_ids)
    return rows, labels.masked_fill(torch.isin(rows["input_ids"], specials), -100)


def token_classification(subject: Subject) -> str:
    """Labels of -100 are ignored."""
    model = subject.load("AutoModelForTokenClassification", num_labels=NUM_LABELS)
    rows, labels = token_labels(subject)
    found = model(**rows, labels=labels)
    return close(found.loss, bert_call(type(model).__name__, found.logits, model.config, {"labels": labels}).loss)


def multiple_choice(subject: Subject) -> str:
    """Three texts are the choices of one question."""
    model = subject.load("AutoModelForMultipleChoice")
    rows = {name: value[None] for name, value in subject.rows().items()}
    found = model(**rows, labels=LABELS[1:2])
    require(found.logits.shape == (1, 3), f"logits are {tuple(found.logits.shape)}")
    call = {"labels": LABELS[1:2], "input_ids": rows["input_ids"]}
    return close(found.loss, bert_call(type(model).__name__, found.logits, model.config, call).loss)


def question_answering(subject: Subject) -> str:
    """Answers inside, in the padding, beyond the row, all beyond it, and with one dimension more."""
    model, rows = subject.load("AutoModelForQuestionAnswering"), subject.rows()
    length = rows["input_ids"].size(1)
    for starts in ([1, 2, 0], [1, 2, length - 1], [1, length + 9, -5], [length] * 3):
        positions = torch.tensor(starts)
        for answer in (positions, positions[:, None]):
            call = {"start_positions": answer, "end_positions": answer}
            found = model(**rows, **call)
            logits = torch.stack([found.start_logits, found.end_logits], -1)
            expected = bert_call(type(model).__name__, logits, model.config, call)
            if math.isnan(float(expected.loss)):
                require(math.isnan(float(found.loss)), f"loss {float(found.loss)}, BERT's is no number")
            else:
                close(found.loss, expected.loss)
    return "8 calls as BERT's"


def masked_language_model(subject: Subject) -> str:
    """The loss of every language model."""
    rows, labels = token_labels(subject)
    models = [subject.load("AutoModelForMaskedLM")]
    if models[0].config.num_auxiliary_layers:
        models.append(MetroForAuxiliaryMaskedLM.from_pretrained(subject.folder, dtype=torch.float32).eval())
    for model in models:
        found = model(**rows, labels=labels)
        close(found.loss, bert_call(type(model).__name__, found.logits, model.config, {"labels": labels}).loss)
    return f"{len(models)} models as BERT's"


def out_of_range(subject: Subject) -> str:
    """Labels beyond the limit are named with it."""
    rows, labels = token_labels(subject)
    text = f"labels hold {NUM_LABELS}, must be from 0 to {NUM_LABELS - 1}"
    classifier = subject.classifier()
    raises(ValueError, lambda: classifier(**rows, labels=LABELS + 1), text)
    tagger = subject.load("AutoModelForTokenClassification", num_labels=NUM_LABELS)
    raises(ValueError, lambda: tagger(**rows, labels=labels.clamp(min=-1) + 1), text)
    chooser = subject.load("AutoModelForMultipleChoice")
    choices = {name: value[None] for name, value in rows.items()}
    return raises(ValueError, lambda: chooser(**choices, labels=LABELS[:1] + 3), text)


def detection(subject: Subject) -> str:
    """Mean over real tokens, whether or not labels mark the padding."""
    model, rows = MetroForReplacedTokenDetection.from_pretrained(subject.folder).eval(), subject.rows()
    labels, is_real = rows["input_ids"] % 2, rows["attention_mask"].bool()
    found = model(**rows, labels=labels)
    chance = found.logits[is_real].double().sigmoid()
    expected = -torch.where(labels[is_real] == 1, chance, 1 - chance).log().mean()
    close(model(**rows, labels=labels.masked_fill(~is_real, -100)).loss, found.loss)
    return close(found.loss, expected)


def pretraining(subject: Subject) -> str:
    """METRO's loss (eq. 9) once more from its logits."""
    model, rows = subject.load("AutoModelForPreTraining"), subject.rows()
    labels = rows["input_ids"].masked_fill(rows["input_ids"] % 4 > 0, -100)
    ids = rows["input_ids"].masked_fill(labels != -100, model.config.mask_token_id)
    found = model(ids, rows["attention_mask"], labels=labels)
    targets, is_real = labels[labels != -100], rows["attention_mask"].bool()
    expected = torch.zeros(())
    for logits, weight in ((found.mlm_logits, 1.0), (found.clm_logits, model.config.clm_weight)):
        if logits is not None:
            chance = logits[labels != -100].softmax(-1)
            expected = expected - weight * chance[torch.arange(len(targets)), targets].log().mean()
    if found.rtd_logits is not None:
        chance = found.rtd_logits[is_real].sigmoid()
        same = (found.noised_input_ids == rows["input_ids"])[is_real]
        expected = expected - model.config.rtd_weight * torch.where(same, chance, 1 - chance).log().mean()
    return close(found.loss, expected, 1e-3)


LOSSES: Checks = {
    "losses of classification": sequence_classification,
    "losses of tagging": token_classification,
    "losses of multiple choice": multiple_choice,
    "losses of question answering": question_answering,
    "losses of language models": masked_language_model,
    "labels out of range": out_of_range,
    "loss of detection": detection,
    "loss of pretraining": pretraining,
}
