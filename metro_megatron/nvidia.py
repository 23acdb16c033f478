"""Transformer Engine and Apex: whether they are there and whole, before megatron-core looks for them.

Where a part of Transformer Engine is missing, or was built for another torch, megatron-core ends with an error of that
part or goes on silently without, depending on the part.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal

from metro_megatron.errors import UserError

Implementation = Literal["local", "transformer_engine"]
AdamKernel = Callable[..., None]
"""multi_tensor_adam_capturable of Transformer Engine and of Apex, which are one and the same: it divides gradients, or
does nothing, as numbers on the device say."""

TE_COMMAND = "pip install --no-build-isolation 'transformer_engine[pytorch,core_cu13]==2.11.0'"
ADAMS = {
    "torch": "torch's fused Adam",
    "transformer_engine": "Transformer Engine's kernel of Adam",
    "apex": "Apex's kernel of Adam",
}
"""By optimizer.adam_impl."""
APEX_COMMAND = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex "
    "(not the package apex on PyPI, which is another project)"
)


@cache
def transformer_engine_fault() -> str:
    """Why Transformer Engine cannot be used, and what mends it; empty where it can.

    Must be asked before megatron-core is imported. One that does not load is hidden from it.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return f"Transformer Engine is not installed: {TE_COMMAND}"
    try:
        import transformer_engine.pytorch  # noqa: F401
        from megatron.core.extensions.transformer_engine import HAVE_TE
    except Exception as error:  # its imports and their assertions raise any
        _hide("transformer_engine")
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        return (
            f"Transformer Engine is installed but does not load ({reason}); its three packages "
            f"must be of one release, built for this torch and its CUDA: {TE_COMMAND}, or without it: "
            "pip uninstall transformer_engine"
        )
    if not HAVE_TE:
        try:
            release = metadata.version("transformer_engine")
        except metadata.PackageNotFoundError:
            release = "of no known release"  # built in place, or what was left of it
        return f"megatron-core cannot use Transformer Engine {release}; install one that it can: {TE_COMMAND}"
    return ""


def _hide(package: str) -> None:
    """Have further imports of a package fail as if it were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]  # what Python's import system takes for absent


@cache
def apex_fault() -> str:
    """Why Apex's Adam cannot be used, and what mends it; empty where it can."""
    if importlib.util.find_spec("amp_C") is None:
        installed = importlib.util.find_spec("apex")
        if installed is None:
            return f"Apex is not installed: {APEX_COMMAND}"
        is_nvidias = any(Path(place, "optimizers").is_dir() for place in installed.submodule_search_locations or ())
        what = "Apex is installed without its CUDA kernels" if is_nvidias else "the package apex is not NVIDIA's"
        return f"{what}: pip uninstall apex; {APEX_COMMAND}"
    try:
        importlib.import_module("torch")  # whose libraries the extension is built on
        importlib.import_module("amp_C")
    except (ImportError, OSError) as error:
        return f"Apex's kernels do not load ({error}); build them with this torch: {APEX_COMMAND}"
    return ""


def transformer_impl(asked: str, device: str, precision: str) -> Implementation:
    """What parallel.transformer_impl means: auto takes Transformer Engine on a GPU where it is whole.

    Not in fp32, whose products it computes in TF32.
    """
    if asked == "auto":
        is_fit = device == "cuda" and precision != "fp32" and not transformer_engine_fault()
        return "transformer_engine" if is_fit else "local"
    return "local" if asked == "local" else "transformer_engine"


def adam_kernel(implementation: str) -> AdamKernel | None:
    """The kernel of optimizer.adam_impl; None: torch's own."""
    if implementation == "torch":
        return None
    name = {"transformer_engine": "transformer_engine_torch", "apex": "amp_C"}[implementation]
    kernel: AdamKernel = importlib.import_module(name).multi_tensor_adam_capturable
    return kernel


def refuse_missing(transformer_impl: str, adam_impl: str, fp8_recipe: str, device: str) -> None:
    """Raise UserError with all that the named options need and this machine does not have."""
    asks = {
        "parallel.transformer_impl": transformer_impl == "transformer_engine",
        "optimizer.adam_impl": adam_impl == "transformer_engine",
        "train.fp8_recipe": fp8_recipe != "none",
    }
    names = [name for name, is_asked in asks.items() if is_asked]
    found = []
    if names and (fault := transformer_engine_fault()):
        found.append(f"{' and '.join(names)} need Transformer Engine: {fault}")
    elif fp8_recipe != "none" and device == "cuda" and (reason := _fp8_obstacle()):
        found.append(f"train.fp8_recipe is {fp8_recipe}, but {reason}; set it none")
    if adam_impl == "apex" and (fault := apex_fault()):
        found.append(f"optimizer.adam_impl is apex: {fault}, or set it torch")
    if found:
        raise UserError(found)


def _fp8_obstacle() -> str:
    from transformer_engine.pytorch.fp8 import check_fp8_support

    works, reason = check_fp8_support()
    return "" if works else str(reason)


def linear_layers(asked: str, device: str, precision: str) -> str:
    """Whose linear layers parallel.transformer_impl means, with the release."""
    if transformer_impl(asked, device, precision) == "local":
        return "megatron-core's linear layers"
    return f"Transformer Engine {metadata.version('transformer_engine')}'s linear layers"


def describe(asked: str, device: str, precision: str, fp8_recipe: str, adam_impl: str) -> str:
    """One sentence for the start of a run: which linear layers and which Adam it has, and why."""
    layers = linear_layers(asked, device, precision)
    if fp8_recipe != "none":
        layers += f" in FP8 ({fp8_recipe} scaling; the first and last of each encoder in bf16)"
    elif asked == "auto" and device == "cuda" and transformer_impl(asked, device, precision) == "local":
        layers += f" ({transformer_engine_fault() or 'Transformer Engine computes fp32 in TF32'})"
    return f"Implementations: {layers}; {ADAMS[adam_impl]}."
