"""Transformer Engine's own Python on a machine without a GPU: its C++ extension is replaced by what torch computes.

Modules, autograd functions, communication, FP8 recipes with their state, and optimizer are Transformer Engine's,
over gloo. Products, casts and Adam's kernel are torch's, in FP32. So names, shapes, shards, control flow and the order
of arguments are tested; speed and a GPU's numbers are not.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

import torch

DTYPES = {"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6}
DTYPES |= {"kFloat8E4M3": 7, "kFloat8E5M2": 8, "kFloat4E2M1": 10}
ORDER = {
    "FP8FwdTensors": [f"GEMM{i}_{part}" for i in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")],
    "FP8BwdTensors": [f"GRAD_{part}{i}" for i in (1, 2, 3) for part in ("OUTPUT", "INPUT")],
}
"""Of enums whose values are indices; of the others only the names matter, and any name is admitted."""
BACKENDS = ("NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8")


class _Missing:
    """A function of the extension without a stand-in: importing it works, calling it says so."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{self.__name__} has no stand-in on the CPU")


class _Member(int):
    """A value of one of the extension's enums."""


class _Enum(type):
    """Its members are made when they are first asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name == "__members__":
            return dict.fromkeys(BACKENDS)
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Member(ORDER[cls.__name__].index(name) if cls.__name__ in ORDER else len(vars(cls)))
        setattr(cls, name, made)
        return made


class Extension(types.ModuleType):
    """transformer_engine_torch."""

    def __init__(self) -> None:
        super().__init__("transformer_engine_torch")
        self.DType = enum.IntEnum("DType", DTYPES)  # type: ignore[misc]
        for kernel in (generic_gemm, quantize, dequantize, fp8_transpose, bgrad_quantize, multi_tensor_adam_capturable):
            setattr(self, kernel.__name__, kernel)
        self.get_cublasLt_version = lambda: 130200
        self.get_cudnn_version = lambda: 92000
        self.get_num_cublas_streams = lambda: 4
        self.device_supports_multicast = lambda *args: False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = _Enum(name, (), {}) if name[0].isupper() else _Missing(name)
        setattr(self, name, made)
        return made


class _Hopper:
    """What the checks of FP8 are told about the GPU."""

    name, major, minor, multi_processor_count, total_memory = "stand-in", 9, 0, 132, 80 * 2**30


def install(site: str) -> None:
    """Make `import transformer_engine.pytorch` work; `site` holds Transformer Engine's Python.

    Before anything imports megatron-core.
    """
    assert "megatron.core" not in sys.modules
    sys.path.insert(0, site)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # transformer_engine.common then loads no CUDA libraries
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    sys.modules["transformer_engine_torch"] = Extension()
    for name in ("einops", "onnx", "onnxscript"):  # of its attention and its exporter, which are not ours
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda *args, **kwargs: _Hopper()
    cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_device = lambda: torch.device("cpu")
    # Importing the package imports its parts, so the loader of the extension is replaced before that.
    spec: Any = importlib.util.find_spec("transformer_engine")
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)
    distributed: Any = importlib.import_module("transformer_engine.pytorch.distributed")
    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _admit_cpu_tensors(importlib.import_module("transformer_engine.pytorch.module.base").TransformerEngineBaseModule)


def _admit_cpu_tensors(module: Any) -> None:
    """Two assertions ask for CUDA: at construction and at the start of a forward."""
    construct, prepare = module.__init__, module.prepare_forward
    cuda: Any = torch.cuda
    tensor: Any = torch.Tensor

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        real, cuda.is_available = cuda.is_available, lambda: True
        try:
            construct(self, *args, **kwargs)
        finally:
            cuda.is_available = real

    @contextlib.contextmanager
    def prepare_forward(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        entered = prepare(self, *args, **kwargs)
        tensor.is_cuda = property(lambda tensor: True)
        try:
            value = entered.__enter__()
        finally:
            del tensor.is_cuda
        yield value
        entered.__exit__(None, None, None)

    module.__init__, module.prepare_forward = __init__, prepare_forward


def _torch_dtype(dtype: Any) -> torch.dtype:
    names = {"kByte": torch.uint8, "kInt32": torch.int32, "kFloat32": torch.float32, "kFloat16": torch.float16}
    names |= {"kBFloat16": torch.bfloat16, "kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}
    return names[dtype.name]


def plain(x: Any) -> torch.Tensor:
    """A tensor in FP32; a quantized one from whichever of its two copies is there."""
    if not hasattr(x, "_fp8_dtype"):
        return x.detach().float()
    fp8 = _torch_dtype(x._fp8_dtype)
    if x._data is not None:
        return x._data.view(fp8).float() * x._scale_inv
    raw = x._transpose.view(fp8).float()
    return raw.permute(*range(1, raw.dim()), 0) * x._scale_inv


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    out: Any,
    quantizer: Any,
    out_dtype: Any,
    bias: Any,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    alpha: float = 1.0,
    beta: float | None = None,
    comm_overlap: Any = None,
    **others: Any,
) -> tuple[Any, ...]:
    """cuBLAS is column-major: out = op(B) @ op(A)."""
    assert comm_overlap is None and not gelu
    a, b = plain(A), plain(B)
    lead, a, b = b.shape[:-1], a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    result = (b.t() if transb else b) @ (a.t() if transa else a) * alpha
    bias_grad = b.sum(0).to(bias.dtype) if bias is not None and grad else None
    if bias is not None and not grad:
        result = result + bias.float()
    if not transb:
        result = result.view(*lead, -1)
    if out is None:
        out = result.to(_torch_dtype(out_dtype) if out_dtype is not None else A.dtype)
    elif accumulate:
        out.add_(result.view_as(out).to(out.dtype))
    else:
        out.copy_(result.view_as(out))
    return out if quantizer is None else quantizer(out), bias_grad, None, others.get("extra_output")


def quantize(tensor: Any, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Current scaling of a whole tensor."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    if noop is not None and bool(noop):
        return output
    source, fp8 = plain(tensor), _torch_dtype(quantizer.dtype)
    limit, amax = torch.finfo(fp8).max, source.abs().max()
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
    scale = (limit / amax if amax > 0 else torch.ones(())).reshape(1)
    if quantizer.force_pow_2_scales:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    data = (source * scale).clamp(-limit, limit).to(fp8).view(torch.uint8)
    turned = fp8_transpose(data, quantizer.dtype)
    if output is not None:
        if output._data is not None:
            output._data.copy_(data.view(output._data.shape))
        if output._transpose is not None:
            output._transpose.copy_(turned.view(output._transpose.shape))
            output._transpose_invalid = False
        output._scale_inv.copy_(1 / scale)
        return output
    parts = {
        "data": data if quantizer.rowwise_usage else None,
        "data_transpose": turned if quantizer.columnwise_usage else None,
        "fp8_scale_inv": 1 / scale,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**parts)
    return Float8Tensor(shape=tensor.shape, dtype=tensor.dtype, **parts)


def dequantize(tensor: Any, dtype: Any) -> torch.Tensor:
    return plain(tensor).to(_torch_dtype(dtype))


def fp8_transpose(data: torch.Tensor, dtype: Any, out: Any = None) -> Any:
    turned = data.reshape(-1, data.shape[-1]).t().contiguous()
    return turned.view(data.shape[-1], *data.shape[:-1]) if out is None else out.copy_(turned.view(out.shape))


def bgrad_quantize(tensor: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    return tensor.float().reshape(-1, tensor.shape[-1]).sum(0).to(tensor.dtype), quantizer(tensor)


def multi_tensor_adam_capturable(
    chunk: int,
    noop: torch.Tensor,
    lists: list[list[torch.Tensor]],
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: torch.Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: torch.Tensor,
) -> None:
    """The kernel of Transformer Engine and of Apex, with the formats that it reads pointers as."""
    assert (noop.dtype, step.dtype, lr.dtype, inv_scale.dtype) == (torch.int32, torch.int32, *[torch.float32] * 2)
    assert mode == bias_correction == 1
    if noop.item() == 1:
        return
    first, second = 1 - beta1 ** step.item(), 1 - beta2 ** step.item()
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        scaled = gradient * inv_scale
        mean.copy_(beta1 * mean + (1 - beta1) * scaled)
        square.copy_(beta2 * square + (1 - beta2) * scaled * scaled)
        update = (mean / first) / ((square / second).sqrt() + eps) + weight_decay * parameter
        parameter.sub_(lr * update)
