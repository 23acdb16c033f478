"""The vocabulary head on the CPU, for a vocabulary in one piece: logits are made once, forward leaves their gradient.

Legend: M rows, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from fused.linear_cross_entropy.reference import (
    Sampling,
    Statistics,
    VocabularyShard,
    perturbed,
    shard_logits_ref,
)

MOST_KEPT = 2**26
"""Numbers that may stay from forward to backward, M V: 268 MB of FP32. Above it logits are made again."""


def linear_cross_entropy_cpu(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabularyShard,
    sampling: Sampling | None = None,
) -> Statistics:  # fmt: skip
    """What `linear_cross_entropy` computes, for rows on the CPU and at most MOST_KEPT logits."""
    return Statistics(*_LinearCrossEntropy.apply(rows, weight, bias, targets, shard, sampling))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows, weight, bias, targets, shard, sampling):  # type: ignore[override]
        logits = shard_logits_ref(rows, weight, bias, shard)
        sampled = None if sampling is None else perturbed(logits, targets, shard, sampling).argmax(-1)
        top, predicted = logits.max(-1)
        softmax = logits.softmax(-1)
        # The largest logit has exp(0) over the sum.
        lse = top - softmax.gather(1, predicted[:, None])[:, 0].log()
        loss = lse - logits.gather(1, targets[:, None])[:, 0]
        entropy = lse - (softmax[:, None] @ logits[:, :, None])[:, 0, 0]
        # softmax - 1 at the targets: the gradient of each row's loss.
        gradient = softmax.scatter_add_(1, targets[:, None], softmax.new_full((len(targets), 1), -1.0))
        found = Statistics(loss, lse, entropy, predicted, sampled)
        ctx.save_for_backward(rows, weight, gradient)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(*(x for x in found[1:] if x is not None))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor):  # type: ignore[override]
        rows, weight, gradient = ctx.saved_tensors
        gradient = (gradient * grad_loss[:, None]).to(rows.dtype)
        grad_bias = gradient.sum(0) if ctx.has_bias else None
        return gradient @ weight, gradient.t() @ rows, grad_bias, None, None, None
