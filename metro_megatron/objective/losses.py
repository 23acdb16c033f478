"""Cross-entropy over a split vocabulary and replaced token detection (METRO eqs. 4, 6 and 8).

Legend: M masked positions, V vocabulary rows of this rank, S positions, B rows.
"""

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional


def real_logits(logits: Tensor, vocab_size: int, group: ProcessGroup) -> Tensor:
    """FP32 logits [M, V] in which ids that only pad the vocabulary have -inf. Never the input itself."""
    num_ids = logits.size(-1)
    real = min(max(vocab_size - group.rank() * num_ids, 0), num_ids)
    logits = logits.float()
    if real == num_ids:
        return logits
    return functional.pad(logits[:, :real], (0, num_ids - real), value=-torch.inf)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over M of -log softmax(logits)[target], for fp32 logits [M, V] and global ids [M]."""
    if targets.numel() == 0:
        return logits.sum()
    # megatron-core's function works in place on what it is given.
    losses = vocab_parallel_cross_entropy(logits.clone()[:, None], targets[:, None])
    return losses.sum()


def replaced_token_detection_sum(logits: Tensor, is_original: Tensor, is_real: Tensor) -> Tensor:
    """Sum over real tokens of the binary cross-entropy of sigmoid(logits) = P(original); all [S, B]."""
    losses = functional.binary_cross_entropy_with_logits(logits.float(), is_original.float(), reduction="none")
    return (losses * is_real).sum()
