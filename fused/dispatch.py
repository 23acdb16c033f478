"""The one choice between Triton kernels, the CPU's own ways and torch references, and the only import of Triton.

`tl` and `jit` are importable without Triton, so that modules with kernels load anywhere; nothing launches then.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

jit: Callable[..., Any]
try:
    import triton
    import triton.language as tl

    jit = triton.jit
    MISSING = ""
except ImportError as error:
    # What kernels' files evaluate as they load, in signatures and constants; bodies are never run.
    tl = SimpleNamespace(constexpr=lambda value: value)  # type: ignore[assignment]
    jit = lambda function=None, **_: function or jit  # noqa: E731
    MISSING = str(error)
"""MISSING: why Triton cannot be imported; empty where it can."""

INTERPRETED = tl.constexpr(not MISSING and os.environ.get("TRITON_INTERPRET") == "1")
"""True in tests, where Triton can run kernels on the CPU in Python; kernels may read it."""

LEAST_TRITON = (3, 6)
"""torch 2.10's and 2.11's. The tests compile every kernel with it and with the release of constraints.txt."""

LEAST_CAPABILITY = (8, 0)
"""A100. bfloat16 and asynchronous copies start here, and no kernel was compiled for less."""


def without(version: str, missing: str) -> str:
    """Why Triton is of no use, by its release or by what its import said; empty where it is.

    A version that does not begin with two numbers is taken for a new one.
    """
    if missing:
        return f"Triton cannot be imported ({missing}); `pip install triton` where there is a GPU"
    release, least = version.partition("+")[0].split(".")[:2], ".".join(map(str, LEAST_TRITON))
    if not all(part.isdecimal() for part in release) or (*map(int, release),) >= LEAST_TRITON:
        return ""
    return f"kernels need Triton {least} and this is {version}; `pip install 'triton>={least}'`"


WITHOUT = without("" if MISSING else triton.__version__, MISSING)
"""Asked once: operators ask for it in what torch.compile traces, and Dynamo of torch 2.11 follows no parsing."""

HOPPER_SHARED = 227 * 1024
"""Bytes of shared memory that H100 lets a program have; A100 has 163 KB, and 99 are left on RTX and L40 cards."""


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: what is passed, by name and in order, and how it is laid out on the GPU."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def start(self) -> None:
        """On the current stream of the tensors' device; nothing to do where the grid is empty."""
        if min(self.grid) == 0:
            return
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(next(x for x in self.arguments.values() if isinstance(x, Tensor))):
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


OPERATOR_NAMES = ("attention", "layer_norm", "linear_cross_entropy", "softmax_dropout")


class _Choice:
    """Process-wide, not per thread: recomputation runs operators again in threads of autograd's own."""

    references: Counter[str] = Counter()
    interpreted = 0


@contextmanager
def reference_only(*operators: str) -> Iterator[None]:
    """Inside, the named operators (all where none is named) take their torch references; may be nested.

    Backward keeps what its forward took. Raises ValueError for a name that is not in OPERATOR_NAMES.
    """
    if unknown := set(operators) - set(OPERATOR_NAMES):
        raise ValueError(f"no operator is called {', '.join(sorted(unknown))}; there are {', '.join(OPERATOR_NAMES)}")
    names = operators or OPERATOR_NAMES
    _Choice.references.update(names)
    try:
        yield
    finally:
        _Choice.references.subtract(names)


@contextmanager
def interpreted() -> Iterator[None]:
    """For tests: inside, operators on the CPU run their kernels in Triton's interpreter; TRITON_INTERPRET=1 is set."""
    assert INTERPRETED, "TRITON_INTERPRET=1 must be in the environment before fused is imported"
    _Choice.interpreted += 1
    try:
        yield
    finally:
        _Choice.interpreted -= 1


def use_kernel(operator: str, *tensors: Tensor) -> bool:
    """Whether the operator that got these tensors launches its kernel; float64 never does."""
    return not _Choice.references[operator] and all(
        x.dtype != torch.float64 and not _obstacle(x.device) for x in tensors
    )


def use_cpu(operator: str, tensor: Tensor) -> bool:
    """Whether the operator that launches no kernel for this tensor takes its own way on the CPU, not the reference."""
    return not _Choice.references[operator] and tensor.device.type == "cpu"


def describe(device: torch.device) -> str:
    """One sentence for the start of a run: what the operators run on this device, and why."""
    if all(_Choice.references[name] for name in OPERATOR_NAMES):
        return "Fused operators: torch references, because the run asks for them."
    if obstacle := _obstacle(device):
        return f"Fused operators: plain torch, because {obstacle}."
    if device.type != "cuda":
        return "Fused operators: Triton's interpreter, for tests."
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return f"Fused operators: Triton {triton.__version__} kernels on {name} (compute capability {major}.{minor})."


def architecture(device: torch.device) -> int:
    """Key into tables of tile sizes: 90 for H100, H200 and later, where a program may have as much shared memory; else
    80, whose tiles fit into the 99 KB that every GPU has of those the kernels run on, and for the interpreter."""
    if device.type != "cuda":
        return 80
    # By memory too: later consumer cards have a higher capability than H100 and less than half of its shared memory.
    gpu = torch.cuda.get_device_properties(device)
    shared = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs lack it
    return 90 if gpu.major >= 9 and shared >= HOPPER_SHARED else 80


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; the interpreter works as one of 4."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _obstacle(device: torch.device) -> str:
    """Why no kernel can run on this device; empty where one can."""
    if WITHOUT:
        return WITHOUT
    if device.type != "cuda":
        return "" if _Choice.interpreted else f"kernels need a CUDA device and this is {device.type}"
    if INTERPRETED:
        return "TRITON_INTERPRET is set, which is for tests without a GPU; unset it"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"kernels need compute capability 8.0 and this device has {capability[0]}.{capability[1]}"
    return ""
