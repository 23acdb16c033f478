"""What the optimizer holds, parameter by parameter: the part of each that this rank updates."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from metro_megatron.model.encoder import Pair
from metro_megatron.model.init import global_parameters, split_dimension
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer

_THREADS = 4


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter."""

    name: str
    """Global."""
    parameter: torch.nn.Parameter
    first: int
    """Index of the first element here."""
    weight: Tensor
    """[n] of the parameter itself."""
    gradient: Tensor
    """[n] of its gradient, summed over all that contribute once a step's phases are through."""
    master: torch.nn.Parameter
    """What the optimizer updates: the weight, or its master in FP32."""
    state: dict[str, Tensor]
    """The optimizer's, of the master."""
    counts: bool
    """False where another tensor-parallel rank holds the same."""


def shards(pair: Pair, optimizer: Optimizer, layout: Layout) -> Iterator[Shard]:
    """Over all ranks, those that count have every element of every parameter once."""
    names = {
        parameter: name for prefix, module in pair.modules() for name, parameter in global_parameters(module, prefix)
    }
    for one in optimizer.both:
        for parameter, (group, index) in one.model_param_group_index_map.items():
            part = one._get_model_param_range_map(parameter)["param"]
            master = one.optimizer.param_groups[group]["params"][index]
            yield Shard(
                name=names[parameter],
                parameter=parameter,
                first=part.start,
                weight=parameter.detach().view(-1)[part.start : part.end],
                gradient=parameter.main_grad.view(-1)[part.start : part.end],
                master=master,
                state={key: value for key, value in one.optimizer.state[master].items() if torch.is_tensor(value)},
                counts=layout.tensor.rank() == 0 or split_dimension(parameter) is not None,
            )


class WeightNorms:
    """Norms of all parameters, whoever holds them: one collective call each time, one wait for the device."""

    def __init__(self, pair: Pair, optimizer: Optimizer, layout: Layout):
        self.layout = layout
        self.own = [(one.name, one.master.detach()) for one in shards(pair, optimizer, layout) if one.counts]
        everyone: list[dict[str, int]] = [{}] * layout.world.size()
        dist.all_gather_object(everyone, {name: part.numel() for name, part in self.own}, group=layout.world)
        self.sizes: dict[str, int] = {}
        for sizes in everyone:
            for name, size in sizes.items():
                self.sizes[name] = self.sizes.get(name, 0) + size
        number = {name: index for index, name in enumerate(self.sizes)}
        self.index = torch.tensor([number[name] for name, _ in self.own], dtype=torch.int64, device=layout.device)

    @torch.no_grad()
    def measure(self) -> dict[str, tuple[float, int]]:
        """Norm in FP64 and number of elements, by global name; the same on every rank."""
        squares = torch.zeros(len(self.sizes), dtype=torch.float64, device=self.layout.device)
        if self.own:
            norms = torch._foreach_norm([part for _, part in self.own], dtype=torch.float64)  # type: ignore[arg-type]
            squares.index_add_(0, self.index, torch.stack(norms).square())
        dist.all_reduce(squares, group=self.layout.world)
        return dict(zip(self.sizes, zip(squares.sqrt().tolist(), self.sizes.values(), strict=True), strict=True))


@torch.no_grad()
def fingerprint(pair: Pair, optimizer: Optimizer, layout: Layout) -> str:
    """Of all weights, masters and moments, bit for bit: the same in every layout. A collective call that waits.

    Sums of the numbers' bits, each parameter's and state's times a hash of its name, modulo 2^64.
    """
    parts = [
        (value.contiguous().view(-1), 2 * zlib.crc32(f"{one.name} {key}".encode()) + 1)
        for one in shards(pair, optimizer, layout)
        if one.counts
        for key, value in (("", one.master.detach()), *sorted(one.state.items()))
        if value.dim()
    ]

    def sum_of(share: Sequence[tuple[Tensor, int]]) -> Tensor:
        nothing = torch.zeros((), dtype=torch.int64, device=layout.device)
        return sum((factor * _sum_of_bits(value) for value, factor in share), nothing)

    total = sum_of([])
    with ThreadPoolExecutor(_THREADS) as threads:
        each = map if layout.device.type != "cpu" else threads.map
        for part in each(sum_of, [parts[number::_THREADS] for number in range(_THREADS)]):
            total += part
    dist.all_reduce(total, group=layout.world)
    return f"{int(total) & (1 << 64) - 1:016x}"


def _sum_of_bits(numbers: Tensor) -> Tensor:
    """Of FP32 numbers [n], as signed integers, in int64."""
    bits = numbers.view(torch.int32)
    if numbers.device.type != "cpu":
        return bits.sum(dtype=torch.int64)
    # torch's own sum of 32 bits in 64 takes seven times as long on a CPU.
    return torch.tensor(bits.numpy().sum(dtype="int64"))
