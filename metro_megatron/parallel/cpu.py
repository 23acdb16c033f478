"""megatron-core without CUDA: the few CUDA calls it makes unconditionally are answered for the CPU.

`install` is called once, by `Layout.create`, and only when the device is the CPU. megatron-core 0.16 asks
for `device="cuda"` in its optimizer, schedules and checkpoints, for CUDA's random state in its dropout
tracker, and for streams and events around communication; on gloo all of these have plain CPU meanings.

Collectives that megatron-core would overlap are done when the call returns, and left out in a group of one rank. In
torch 2.13 gloo's asynchronous coalesced reduce-scatter damages the heap: a process that does nothing else dies within
some 100,000 of them.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch.utils._device import _device_constructors

FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")


class _Stream:
    """Stands for a CUDA stream: everything it is asked to do has already happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _Event(_Stream):
    """Stands for a CUDA event."""


def _is_cuda(device: object) -> bool:
    return (
        device is not None
        and not isinstance(device, bool)
        and (isinstance(device, int) or str(device).startswith("cuda"))
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core sorts parameters by names such as torch.cuda.FloatTensor."""

    @wraps(original)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return type_name


class _Done:
    """Stands for the handle of collectives that were done one by one."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def _one_by_one(group: object, async_ops: bool = False) -> Iterator[_Done]:
    yield _Done()


def _at_once(collective: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(collective)
    def run(output: torch.Tensor, given: torch.Tensor, **kwargs: Any) -> Any:
        # Of one rank both are one piece of megatron-core's buffer, which gloo copies twice.
        if kwargs["group"].size() == 1 and output.data_ptr() == given.data_ptr():
            return None
        return collective(output, given, **{**kwargs, "async_op": False})

    return run


def _nothing_to_do() -> Callable[..., None]:
    return lambda *args, **kwargs: None


def install() -> None:
    """Answer CUDA's calls for the CPU in this process, for as long as it lives. Safe to call again."""
    import megatron.core.distributed.param_and_grad_buffer as mcore_buffers
    import megatron.core.tensor_parallel.random as mcore_random

    cuda: Any = torch.cuda
    if getattr(cuda.current_device, "is_cpu", False):
        return

    def current_device() -> torch.device:
        return torch.device("cpu")

    current_device.is_cpu = True  # type: ignore[attr-defined]
    cuda.current_device = current_device
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _nothing_to_do())  # torch.compile's tables want a function of its own for each name
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = _type_name(tensor.type)
    # `with torch.device(...)` knows factories by their functions: it remembers torch's own, before ours stand there.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # On the CPU there is one generator, so that the tracker's warning about it says nothing.
    logging.getLogger(mcore_random.__name__).setLevel(logging.ERROR)
    rng: Any = mcore_random
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    buffers: Any = mcore_buffers
    buffers._coalescing_manager = _one_by_one
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _at_once(getattr(buffers, name)))
