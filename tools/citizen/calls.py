"""Checks of calls that every encoder of transformers takes, and of what is done with a loaded model."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from torch import Tensor

from metro_megatron.hf.modeling_metro import MetroForAuxiliaryMaskedLM
from tools.citizen.subject import Checks, Subject, close, equal, require


def inputs_embeds(subject: Subject) -> str:
    """The token embeddings instead of the ids."""
    model, rows = subject.load(), subject.rows()
    words = model.get_input_embeddings()(rows["input_ids"])
    found = model(inputs_embeds=words, attention_mask=rows["attention_mask"])
    return equal(found.last_hidden_state, model(**rows).last_hidden_state)


def return_dict(subject: Subject) -> str:
    """Tuples in the order of BERT's: the loss, if there is one, then logits."""
    model, rows = subject.classifier(), subject.rows()
    labels = torch.tensor([0, 2, 1])
    loss, logits = model(**rows, labels=labels, return_dict=False)
    named = model(**rows, labels=labels)
    equal(loss, named.loss)
    require(len(model(**rows, return_dict=False)) == 1, "more than logits without labels")
    return equal(logits, named.logits)


def token_type_ids(subject: Subject) -> str:
    """What a collator for BERT hands over changes nothing."""
    model, rows = subject.classifier(), subject.rows()
    types = torch.ones_like(rows["input_ids"])
    equal(model(rows["input_ids"], rows["attention_mask"], types).logits, model(**rows).logits)
    return equal(model(**rows, token_type_ids=types).logits, model(**rows).logits)


def all_outputs(subject: Subject) -> str:
    """Hidden states and attentions of every layer, which add up to 1."""
    model, rows = subject.load(attn_implementation="eager"), subject.rows()
    found = model(**rows, output_hidden_states=True, output_attentions=True)
    layers = model.config.num_hidden_layers
    require(len(found.hidden_states) == layers + 1 and len(found.attentions) == layers, "layers are missing")
    equal(found.hidden_states[-1], found.last_hidden_state)
    sums = torch.stack(found.attentions).sum(-1)
    return close(sums, torch.ones_like(sums))


def resized(subject: Subject) -> str:
    """More tokens: the old logits stay, in every decoder, and all decoders stay tied."""
    ids = subject.rows()["input_ids"]
    pair = subject.load("AutoModelForPreTraining")
    parts: list[tuple[Any, tuple[str, ...], dict[str, Tensor]]] = [
        (pair, ("mlm_logits", "clm_logits"), {"noised_input_ids": ids})
    ]
    if pair.config.num_auxiliary_layers:
        parts.append((MetroForAuxiliaryMaskedLM.from_pretrained(subject.folder).eval(), ("logits",), {}))
    count = 0
    for model, outputs, others in parts:
        size = model.config.vocab_size
        before = model(ids, **others)
        model.resize_token_embeddings(size + 7)
        after = model(ids, **others)
        words = model.get_input_embeddings().weight
        require(len(words) == size + 7 == model.config.vocab_size, f"{len(words)} rows, expected {size + 7}")
        for name in outputs:
            if getattr(before, name, None) is not None:
                close(getattr(after, name)[..., :size], getattr(before, name))
                count += 1
        heads = [m for n, m in model.named_modules() if n.endswith("_head.decoder") and hasattr(m, "weight")]
        require(all(head.weight is words for head in heads), "a decoder is not tied any more")
    return f"{count} outputs kept"


def checkpointing(subject: Subject) -> str:
    """Gradient checkpointing gives the same gradients."""
    gradients = []
    for is_on in (False, True):
        model = subject.classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if is_on:
            model.gradient_checkpointing_enable()
        model(**subject.rows(), labels=torch.tensor([0, 2, 1])).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return close(gradients[1], gradients[0])


def warns_of_masks(subject: Subject) -> str:
    """Main says once that it never saw <mask>, and who fills it."""
    model, ids = subject.load("AutoModelForMaskedLM"), subject.rows()["input_ids"]
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    transformers.utils.logging.warning_once.cache_clear()  # another model of this process may have said it
    logger = logging.getLogger(type(model).__module__)
    logger.addHandler(handler)
    try:
        model(ids)
        require(not said, f"warns without <mask>: {said}")
        ids[0, 3] = subject.tokenizer.mask_token_id
        model(ids), model(ids)
    finally:
        logger.removeHandler(handler)
    if "mlm" in model.config.objectives:
        require(not said, "warns, though main learned to fill <mask>")
        return "main learned to fill <mask>"
    require(len(said) == 1 and "<mask>" in said[0], f"said {said}")
    return "said once"


def compiled(subject: Subject) -> str:
    """torch.compile computes the same."""
    model, rows = subject.classifier(), subject.rows()
    with torch.no_grad():
        return close(torch.compile(model)(**rows).logits, model(**rows).logits)


CALLS: Checks = {
    "inputs_embeds": inputs_embeds,
    "return_dict=False": return_dict,
    "token_type_ids": token_type_ids,
    "hidden states and attentions": all_outputs,
    "resize_token_embeddings": resized,
    "gradient checkpointing": checkpointing,
    "a warning of <mask>": warns_of_masks,
    "torch.compile": compiled,
}
