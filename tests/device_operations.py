"""What a GPU would be given to do, counted without one: torch's operations on tensors and Triton's launches."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from fused.dispatch import Launch, interpreted

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class _Mode(TorchDispatchMode):
    """Counts what launches; operators of fused are entered, and what they do inside is counted in their place."""

    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = function._schema.name.split("::")
        if namespace == "fused":
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
        # Below autograd, where operators of fused run, torch has not yet taken apart what is made of other operations.
        with self:
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if launches(function):
            self.counts[name] += 1
        return function(*args, **kwargs)


def launches(function: Any) -> bool:
    """Whether an operation of torch starts a kernel: not where it allocates, or returns a view of what it got."""
    schema = function._schema
    is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
    is_tensor = any("Tensor" in str(one.type) for one in schema.returns)
    return is_tensor and not is_view and schema.name.split("::")[1] not in {*ALLOCATIONS, "_unsafe_view"}


@contextmanager
def device_operations() -> Iterator[Counter[str]]:
    """Inside, operators on the CPU go the way of their kernels, which are counted by name and compute nothing.

    Views and allocations are not counted. Memory that a kernel would have written is undefined.
    """
    counts: Counter[str] = Counter()

    def start(launch: Launch) -> None:
        counts[f"{launch.kernel.fn.__module__}.{launch.kernel.fn.__name__}"] += min(launch.grid) > 0

    with interpreted(), mock.patch.object(Launch, "start", start), _Mode(counts):
        yield counts
