"""The relative position bias in compact form: one number per head and clipped distance, and maybe two for [CLS].

Legend: N heads of this rank, D largest distance told apart, L longest sample.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class CompactBias(NamedTuple):
    """What attention adds to scaled scores; differentiable in both parts.

    distances [N, 2 D + 1]: entry clamp(key - query, -D, D) + D. cls [N, 2]: entry 0 for every key of query 0,
    itself included, entry 1 for key 0 of every other query (METRO's "reset [CLS]"); None where position 0 is one
    like all others.
    """

    distances: Tensor
    cls: Tensor | None

    def expand(self, max_len: int) -> Tensor:
        """The bias [N, max_len, max_len] of (head, query, key)."""
        position = torch.arange(max_len, device=self.distances.device)
        reach = self.distances.size(1) // 2
        dense = self.distances[:, (position[None, :] - position[:, None]).clamp(-reach, reach) + reach]
        if self.cls is None:
            return dense
        is_first = position == 0
        # The column first, then the row: query 0 with key 0 belongs to the row.
        dense = torch.where(is_first, self.cls[:, 1, None, None], dense)
        return torch.where(is_first[:, None], self.cls[:, 0, None, None], dense)


def check_bias(bias: CompactBias, num_heads: int, device: torch.device) -> None:
    """Raise ValueError unless bias has num_heads rows, an odd count of distances, a float type, and is on device."""
    distances, cls = bias
    parts = [("distances", distances)] + ([] if cls is None else [("cls", cls)])
    if distances.dim() != 2 or distances.size(0) != num_heads or distances.size(1) % 2 != 1:
        raise ValueError(f"bias.distances is {list(distances.shape)}; it must be [{num_heads}, an odd number]")
    if cls is not None and cls.shape != (num_heads, 2):
        raise ValueError(f"bias.cls is {list(cls.shape)}; it must be [{num_heads}, 2]")
    for name, part in parts:
        if not part.is_floating_point():
            raise ValueError(f"bias.{name} is {part.dtype}; it must be a floating point type")
        if part.device != device:
            raise ValueError(f"bias.{name} is on {part.device} and q on {device}; move one of them")


def clip_distances(sums: Tensor, reach: int) -> Tensor:
    """Sums [N, 2 L - 1] over distances -(L - 1) .. L - 1 to sums over clipped ones, [N, 2 reach + 1]; no atomics."""
    # Distances beyond reach share the bias of the end, so that their gradients add up there; a table that is wider than
    # the samples are long has entries that nothing read, whose gradient is 0.
    middle = sums.size(1) // 2
    if reach >= middle:
        return torch.nn.functional.pad(sums, (reach - middle, reach - middle))
    inner = sums[:, middle - reach : middle + reach + 1].clone()
    inner[:, 0] += sums[:, : middle - reach].sum(1)
    inner[:, -1] += sums[:, middle + reach + 1 :].sum(1)
    return inner
