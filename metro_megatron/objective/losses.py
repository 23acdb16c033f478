"""Cross-entropy over a split vocabulary and replaced token detection (METRO eqs. 4, 6 and 8).

Legend: M masked positions, V vocabulary rows of this rank, S positions, B rows.
"""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from fused.linear_cross_entropy import Statistics, VocabularyShard, combine, shard_loss, shard_statistics
from metro_megatron.model.heads import Decoding
from metro_megatron.vocabulary import NUM_SPECIALS


def vocabulary_statistics(
    decoding: Decoding, targets: Tensor, vocab_size: int, group: ProcessGroup, noise_keys: Tensor | None = None
) -> Statistics:
    """Losses [M] with their graph, most probable ids, and with noise_keys [M, 2] samples; the same on every rank.

    Ranks exchange 5 or 7 numbers a row. targets [M] are global ids.
    """
    shard = VocabularyShard(group.rank() * decoding.weight.size(0), vocab_size, NUM_SPECIALS)
    partial = shard_statistics(*decoding, targets, shard, noise_keys)
    gathered = partial.new_empty(group.size() * partial.size(0), partial.size(1))
    dist.all_gather_into_tensor(gathered, partial, group=group)
    statistics = combine(gathered.view(group.size(), *partial.shape))
    return statistics._replace(loss=shard_loss(*decoding, targets, shard, statistics))


def replaced_token_detection_sum(logits: Tensor, is_original: Tensor, is_real: Tensor) -> Tensor:
    """Sum over real tokens of the binary cross-entropy of sigmoid(logits) = P(original); all [S, B]."""
    losses = functional.binary_cross_entropy_with_logits(logits.float(), is_original.float(), reduction="none")
    return (losses * is_real).sum()
