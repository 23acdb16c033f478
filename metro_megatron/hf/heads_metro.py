"""The heads of METRO-LM's models: what they were pretrained with, what tasks begin with, and which parts are tied.

Legend: B rows, S slots of a row, H hidden, D width of the token table, V vocabulary, C labels.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_metro import MetroConfig
from .encoder_metro import SHARED_EMBEDDINGS, encoder_sizes, readable

IGNORED = -100
"""Label of positions that have none."""


class MetroCLMHead(nn.Module):
    """h E^T + b with the tied token embedding E (METRO eq. 8); H must be D."""

    def __init__(self, config: MetroConfig):
        super().__init__()
        self.decoder = nn.Linear(config.table_width, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] to logits [B, S, V]."""
        return self.decoder(hidden)


class MetroMLMHead(MetroCLMHead):
    """LN(gelu(h W + b)), of width D, before the tied decoder (METRO eq. 4, with COCO-LM's layers).

    The auxiliary model's head, and main's where config.lm_head is "dense".
    """

    def __init__(self, config: MetroConfig, is_auxiliary: bool):
        super().__init__(config)
        self.dense = nn.Linear(encoder_sizes(config, is_auxiliary).hidden_size, config.table_width)
        self.norm = nn.LayerNorm(config.table_width, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] to logits [B, S, V]."""
        return super().forward(self.norm(functional.gelu(self.dense(hidden))))


def main_lm_head(config: MetroConfig) -> MetroCLMHead:
    """As config.lm_head says. Raises ValueError where the token table cannot be the decoder."""
    if config.lm_head == "dense":
        return MetroMLMHead(config, is_auxiliary=False)
    if config.table_width != config.hidden_size:
        raise ValueError(
            f"lm_head is 'linear', its decoder is the token embedding of width {config.table_width}, which cannot read "
            f"hidden_size {config.hidden_size}; choose lm_head 'dense'"
        )
    return MetroCLMHead(config)


class MetroDenseTokenHead(nn.Linear):
    """One logit of gelu(h W + b) for every position (ELECTRA's discriminator)."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] to [B, S, 1]."""
        return super().forward(functional.gelu(self.dense(hidden)))


def detection_head(config: MetroConfig) -> nn.Linear:
    """Hidden states to one logit, as config.rtd_head says."""
    if config.rtd_head == "dense":
        return MetroDenseTokenHead(config.hidden_size)
    return nn.Linear(config.hidden_size, 1)


MAIN_HEADS: dict[str, Callable[[MetroConfig], nn.Module]] = {
    "rtd": detection_head,
    "clm": main_lm_head,
    "cloze": main_lm_head,
    "mlm": main_lm_head,
}
"""What stands behind main as `{objective}_head`, by objective. Of sequence contrast ("scl") none is kept: its head is a
projection that serves the contrastive loss alone, and what tasks read is the state of <s>."""
LANGUAGE_MODELS = ("clm", "mlm")
"""Objectives that give logits of the original tokens; a run has at most one of them."""


def require(config: MetroConfig, *objectives: str) -> str:
    """The one of objectives that main was pretrained with. Raises ValueError if it is none of them."""
    for objective in objectives:
        if objective in config.objectives:
            return objective
    raise ValueError(
        f"this model was pretrained with {', '.join(config.objectives)} and has no head of "
        f"{' or '.join(objectives)}; MetroForPreTraining loads the heads that it has"
    )


def require_auxiliary(config: MetroConfig) -> None:
    """Raise ValueError where there is no auxiliary model."""
    if not config.num_auxiliary_layers:
        raise ValueError(
            "this model has no auxiliary encoder (num_auxiliary_layers is 0); MetroModel loads what it has"
        )


def tied_weights(shared_embeddings: str, shared_lm_bias: bool, heads: Collection[str]) -> dict[str, str]:
    """Parameters that are others: decoders of the heads, and what the auxiliary, if it is among them, shares."""
    shared = SHARED_EMBEDDINGS[shared_embeddings]
    owners = {head: "auxiliary" if head == "auxiliary" and not shared else "metro" for head in heads if head != "rtd"}
    tied = {
        f"{head}_head.decoder.weight": f"{owner}.embeddings.word_embeddings.weight" for head, owner in owners.items()
    }
    if "auxiliary" not in heads:
        return tied
    for part in shared[1:]:
        for kind in ("weight", "bias") if part == "norm" else ("weight",):
            tied[f"auxiliary.embeddings.{part}.{kind}"] = f"metro.embeddings.{part}.{kind}"
    if shared_lm_bias:
        tied["auxiliary_head.decoder.bias"] = "clm_head.decoder.bias"
    return tied


class MetroClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, linear on the hidden state of <s>."""

    def __init__(self, config: MetroConfig, num_labels: int):
        super().__init__()
        self.dropout = nn.Dropout(task_dropout(config))
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, state: Tensor) -> Tensor:
        """States [..., H], as of `first_states`, to logits [..., C]."""
        pooled = torch.tanh(self.dense(self.dropout(state)))
        return self.out_proj(self.dropout(pooled))


def first_slots(attention_mask: Tensor | None) -> Tensor | int:
    """Where <s> stands: [B, 1], the first slot that attention_mask [B, S] shows; 0 without such a mask."""
    if attention_mask is None or attention_mask.dim() != 2:
        return 0
    return attention_mask.ne(0).int().argmax(dim=-1, keepdim=True)


def first_states(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hidden states [B, S, H] of <s>, [B, H]."""
    slots = first_slots(attention_mask)
    if isinstance(slots, int):
        return hidden[:, slots]
    return hidden[torch.arange(hidden.size(0), device=hidden.device), slots[:, 0].to(hidden.device)]


def check_labels(labels: Tensor | None, limit: int, what: str) -> None:
    """Raise ValueError where labels are neither IGNORED nor from 0 to limit - 1; `what` is the limit's name.

    The loss of torch says that an index is out of bounds, and on a GPU ends the process. It says itself that floats are
    no classes.
    """
    if labels is None or labels.is_floating_point() or not readable(labels):
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= limit))]
    if wrong.numel():
        raise ValueError(
            f"labels hold {int(wrong[0])}, must be from 0 to {limit - 1} ({what} is {limit}), or {IGNORED} for none"
        )


def num_labels(config: MetroConfig) -> int:
    """C; a configuration counts them by their names."""
    return config.num_labels or 0


def task_dropout(config: MetroConfig) -> float:
    """Dropout of fine-tuning heads."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
