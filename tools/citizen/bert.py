"""BERT's heads of transformers on logits of ours: the loss, or the exception, of the same call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import transformers
from torch import Tensor, nn

HEADS = {
    "MetroForSequenceClassification": ("BertForSequenceClassification", "classifier"),
    "MetroForTokenClassification": ("BertForTokenClassification", "classifier"),
    "MetroForMultipleChoice": ("BertForMultipleChoice", "classifier"),
    "MetroForQuestionAnswering": ("BertForQuestionAnswering", "qa_outputs"),
    "MetroForMaskedLM": ("BertForMaskedLM", "cls"),
    "MetroForAuxiliaryMaskedLM": ("BertForMaskedLM", "cls"),
}
"""BERT's class, and the module that makes its logits, for a class of ours."""


def bert_call(kind: str, logits: Tensor, config: Any, call: dict[str, Tensor]) -> Any:
    """What BERT's class for ours of this name returns in a call, if its last layer says these logits.

    logits as our class returns them; of question answering [B, S, 2]. config: num_labels, problem_type and vocab_size
    count, and problem_type is set as by our class.
    """
    name, last = HEADS[kind]
    settings = {"num_labels": config.num_labels, "problem_type": config.problem_type, "vocab_size": config.vocab_size}
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    bert = getattr(transformers, name)(transformers.BertConfig(**sizes, **settings)).eval()
    setattr(bert, last, nn.Identity())
    said = logits.reshape(-1, 1) if kind == "MetroForMultipleChoice" else logits
    bert.bert.forward = lambda *args, **kwargs: _Encoded(said)
    found = bert(**call)
    config.problem_type = bert.config.problem_type
    return found


class _Encoded(SimpleNamespace):
    """An encoder's output whose hidden states and pooled state are the logits."""

    def __init__(self, logits: Tensor):
        super().__init__(hidden_states=None, attentions=None, last_hidden_state=logits)
        self.logits = logits

    def __getitem__(self, index: int) -> Tensor:
        return self.logits
