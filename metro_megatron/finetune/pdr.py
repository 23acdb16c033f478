"""Posterior differential regularization (METRO eqs. 11-12): noise on the input shall not change what a model says.

R(f(x), f(x + e)), x the token embeddings before positions and LayerNorm, as in R3F; every element of e is drawn, not
searched. Both forwards draw dropout anew, so that R is about dropout, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

TARGETS = ("labels", "start_positions", "end_positions")
"""Inputs that the noised forward has no use for."""


def symkl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) of log probabilities [M, K], gradients on both sides: [M]."""
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


def symkl_detached(p: Tensor, q: Tensor) -> Tensor:
    """The same, in either direction with gradients only of what is compared with (MT-DNN)."""
    return kl(p.detach(), q) + kl(q.detach(), p)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q): p is what the model says without noise."""
    return (p.exp() * (p - q)).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats."""
    middle = torch.maximum(p, q) + torch.log1p(torch.expm1(-(p - q).abs()) / 2)  # exactly p where q is p
    return (kl(p, middle) + kl(q, middle)) / 2


def hellinger(p: Tensor, q: Tensor) -> Tensor:
    """Squared Hellinger distance, from 0 to 1."""
    return ((p / 2).exp() - (q / 2).exp()).square().sum(-1) / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "symkl": symkl,
    "symkl_detached": symkl_detached,
    "kl": kl,
    "js": js,
    "hellinger": hellinger,
}


@dataclass(frozen=True)
class Regularizer:
    """R of a model's outputs: a mean over what its loss is a mean over, in FP32 or FP64."""

    divergence: str
    """Of DIVERGENCES; a regression has the squared difference instead."""
    radius: float
    noise: str
    """uniform in [-radius, radius], or normal with that standard deviation."""

    def noised(self, model: nn.Module, inputs: Mapping[str, Any], embedding: nn.Module) -> Mapping[str, Tensor]:
        """The outputs of model for inputs without targets, with noise on what its module `embedding` returns."""
        with noised_output(embedding, self._draw):
            return model(**{name: value for name, value in inputs.items() if name not in TARGETS})

    def __call__(
        self,
        outputs: Mapping[str, Tensor],
        noised: Mapping[str, Tensor],
        labels: Tensor | None,
        config: PreTrainedConfig,
    ) -> Tensor:
        """A scalar. Tagging: over tokens that have a label; choices: over candidates; spans: over positions."""
        pairs = [(outputs[name], noised[name]) for name in _LOGITS if name in outputs]
        if config.problem_type == "regression" or (pairs[0][0].dim() == 2 and pairs[0][0].size(-1) == 1):
            return functional.mse_loss(_wide(pairs[0][0]), _wide(pairs[0][1]))
        if config.problem_type == "multi_label_classification":
            pairs = [tuple(torch.stack([one, torch.zeros_like(one)], -1) for one in pairs[0])]  # type: ignore[misc]
        elif labels is not None and labels.dim() == 2 and pairs[0][0].dim() == 3:
            pairs = [(p[labels != _IGNORED], q[labels != _IGNORED]) for p, q in pairs]
        found = [DIVERGENCES[self.divergence](*(_wide(one).log_softmax(-1) for one in pair)) for pair in pairs]
        return torch.stack([one.mean() for one in found]).mean()

    def _draw(self, embedded: Tensor) -> Tensor:
        noise = torch.empty_like(embedded)
        if self.noise == "uniform":
            return noise.uniform_(-self.radius, self.radius)
        return noise.normal_(0, self.radius)


_LOGITS = ("logits", "start_logits", "end_logits")
_IGNORED = -100


@contextmanager
def noised_output(module: nn.Module, draw: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add what `draw` returns for it to what a module returns."""
    handle = module.register_forward_hook(lambda _module, _inputs, output: output + draw(output))
    try:
        yield
    finally:
        handle.remove()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
