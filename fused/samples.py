"""Where the samples of a batch lie among its tokens. Legend: T tokens, n samples, B padded rows, S their length."""

from typing import NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """Token i of sample b is begin[b] + i * stride.

    begin [n] int64, length [n] int32, longest >= every length and known on the host. Packed rows have stride 1;
    rows [S, B] with the row index fastest have begin = 0..B-1 and stride = B.
    """

    begin: Tensor
    length: Tensor
    longest: int
    stride: int = 1


def packed_samples(cu_seqlens: Tensor, longest: int) -> Samples:
    """Samples of a packed row from cu_seqlens [n + 1], which starts with 0. Made once per batch.

    Raises ValueError where cu_seqlens is on the CPU and does not start with 0, falls, or has a sample above longest.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {list(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be [n + 1] integers")
    length = cu_seqlens.diff()
    # On a GPU its values are not looked at: that would wait for the device in every batch.
    if cu_seqlens.device.type == "cpu":
        if cu_seqlens[0] != 0 or bool((length < 0).any()):
            raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()}; it must start with 0 and never fall")
        _check_longest("cu_seqlens", length, longest)
    # begin in 64 bits, since kernels multiply tokens with strides; longest from the host, since it shapes the grid.
    return Samples(cu_seqlens[:-1].long(), length.int(), longest)


def padded_samples(length: Tensor, longest: int) -> Samples:
    """Samples of rows laid out [S, B] (row index fastest), row b holding length [B] tokens and then padding.

    Raises ValueError where length is on the CPU and has a negative entry or one above longest.
    """
    if length.dim() != 1 or length.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"length is {list(length.shape)} {length.dtype}; it must be [B] integers")
    if length.device.type == "cpu":
        if bool((length < 0).any()):
            raise ValueError(f"length is {length.tolist()}; no entry may be negative")
        _check_longest("length", length, longest)
    return Samples(torch.arange(length.numel(), device=length.device), length.int(), longest, length.numel())


def _check_longest(name: str, length: Tensor, longest: int) -> None:
    if length.numel() and int(length.max()) > longest:
        raise ValueError(f"{name} has a sample of {int(length.max())} tokens; longest is {longest}")


def check_samples(samples: Samples, most_positions: int, device: torch.device) -> None:
    """Raise ValueError for the first part that does not fit; reads no tensor."""
    begin, length, longest, stride = samples
    for name, part, dtype in (("begin", begin, torch.int64), ("length", length, torch.int32)):
        if part.dim() != 1 or part.shape != begin.shape or part.dtype != dtype or part.device != device:
            raise ValueError(
                f"samples.{name} is {list(part.shape)} {part.dtype} on {part.device}; "
                f"it must be [n = {begin.numel()}] {dtype} on {device}"
            )
    if not 0 < longest <= most_positions:
        raise ValueError(f"samples.longest is {longest}; it must be in 1..{most_positions}")
    if stride < 0:
        raise ValueError(f"samples.stride is {stride}; it must not be negative")
