"""The vocabulary head: loss, exact sample, most probable id and entropy without storing the logits.

Start with reference.py, which defines what is computed and how shards of a vocabulary are joined; operator.py has the
public functions, launches and gradients, kernels.py the kernels, cpu.py what stands in for them on a CPU.
"""

from fused.linear_cross_entropy.operator import compile_cases, linear_cross_entropy, shard_loss, shard_statistics
from fused.linear_cross_entropy.reference import (
    NO_ID,
    Sampling,
    Statistics,
    VocabularyShard,
    combine,
    gumbel_noise,
    is_special,
    shard_logits_ref,
    shard_loss_ref,
    shard_statistics_ref,
)

__all__ = [
    "NO_ID",
    "Sampling",
    "Statistics",
    "VocabularyShard",
    "combine",
    "compile_cases",
    "gumbel_noise",
    "is_special",
    "linear_cross_entropy",
    "shard_logits_ref",
    "shard_loss",
    "shard_loss_ref",
    "shard_statistics",
    "shard_statistics_ref",
]
