"""Kernels compiled for any GPU on any machine, and what the compiler made of them.

An operator's file lists its cases in `compile_cases() -> list[CompileCase]`; tools/compile_kernels.py compiles all.
Needs Triton with TRITON_INTERPRET unset; no GPU.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused.dispatch import INTERPRETED, MISSING, Launch

ARCHITECTURES = (80, 90)
"""sm_80 (A100) and sm_90 (H100, H200), which have tile sizes of their own."""

SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a program may have: sm_86 is RTX 30 and A40, 89 RTX 40 and L40S, 120 RTX 50."""

PROCESSORS = {80: 108, 90: 132}
"""Streaming multiprocessors of A100, and of H100 and H200 (SXM)."""

HIDDEN_SIZES = (768, 1024, 1536, 2560)
HEADS = (12, 16, 24, 40)
HEAD_DIM = 64
VOCABULARY = 128_000
ROW_TOKENS = 16_384
SAMPLE_TOKENS = 512
"""Shapes of the presets in examples/: METRO's base, large, XL and XXL."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel as it is launched at one preset's shapes, and what must hold of its machine code."""

    name: str
    """Operator, direction and shape; unique among the cases of one architecture."""
    launch: Launch
    """What the operator launches at this shape; its tensors may be on torch's meta device."""
    architecture: int
    """Of the GPU: a key of SHARED."""
    max_registers: int = 255
    """Of a thread; the hardware has no more, and the compiler spills beyond. Cases ask for fewer where that lets more
    programs share a processor, which has 65,536: 64 registers leave room for 32 warps, 128 for 16."""
    max_stack: int = 0
    """Bytes a thread: what spilled, and arrays indexed at run time."""
    wide_loads: bool = True
    """Whether 128-bit loads from global memory must be there."""
    tensor_cores: bool = False
    """Whether matrix instructions must be there: HMMA on sm_80, HGMMA on sm_90."""


@dataclass(frozen=True)
class MachineCode:
    """What the compiler made of a case. Counts are of instructions in the code, not of executions."""

    registers: int
    stack: int
    """Bytes a thread."""
    shared: int
    """Bytes a program."""
    spills: int
    """Loads and stores of thread-local memory."""
    wide_loads: int
    loads: int
    matrix: int

    def problems(self, case: CompileCase) -> list[str]:
        """What does not hold of the case's expectations."""
        found = []
        if self.registers > case.max_registers:
            found.append(f"{self.registers} registers, at most {case.max_registers} expected")
        if self.shared > SHARED[case.architecture]:
            limit = SHARED[case.architecture]
            found.append(f"{self.shared:,} bytes of shared memory, the GPU lets a program have {limit:,}")
        if self.stack > case.max_stack:
            found.append(f"{self.stack} bytes of stack, at most {case.max_stack} expected")
        if self.spills and not case.max_stack:
            found.append(f"{self.spills} loads and stores of spilled registers, none expected")
        if case.wide_loads and not self.wide_loads:
            found.append(f"no 128-bit load among {self.loads} loads from global memory")
        if case.tensor_cores and not self.matrix:
            found.append("no matrix instruction")
        return [f"{case.name}, sm_{case.architecture}: {problem}" for problem in found]


def obstacle() -> str:
    """Why nothing can be compiled in this process, with the remedy; empty where it can."""
    if MISSING:
        return f"Triton cannot be imported ({MISSING}); pip install triton"
    return "TRITON_INTERPRET is set, which replaces the compiler by an interpreter; unset it" if INTERPRETED else ""


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor for compile cases: a shape and a type, no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cases_for(cases: Sequence[CompileCase], architecture: int) -> list[CompileCase]:
    """Those of an architecture; one without tiles of its own takes sm_80's, as `dispatch.architecture` does."""
    tiles = architecture if architecture in ARCHITECTURES else ARCHITECTURES[0]
    return [replace(case, architecture=architecture) for case in cases if case.architecture == tiles]


def compile_case(case: CompileCase) -> MachineCode:
    """Compile one case, from Triton's cache where it was compiled before; seconds each otherwise."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = case.launch
    arguments = launch.arguments
    assert list(arguments) == launch.kernel.arg_names, (case.name, launch.kernel.arg_names)
    # As a launch would: types from the values, None, 1 and tl.constexpr built into the code, and a promise of alignment
    # where 16 divides, without which no load would be 128 bits wide; the last two not for what the kernel exempts.
    params = launch.kernel.params
    types = {one.name: argument_type(arguments[one.name], one.is_constexpr, one.do_not_specialize) for one in params}
    exempt = {one.name for one in params if one.do_not_specialize or one.do_not_specialize_on_alignment}
    source = ASTSource(
        fn=launch.kernel,
        signature=types,
        constexprs={name: arguments[name] for name, kind in types.items() if kind == "constexpr"},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, (name, kind) in enumerate(types.items())
            if name not in exempt and _is_aligned(arguments[name], kind)
        },
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = compile_kernel(source, target=GPUTarget("cuda", case.architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage, code = _binary_tool("cuobjdump", "-res-usage", file.name), _binary_tool("nvdisasm", "-c", file.name)
    return read_code(usage, code, compiled.metadata.shared)


def argument_type(value: Any, is_constexpr: bool, is_exempt: bool = False) -> str:
    """Triton's name for the type that a launch gives an argument; None and, unless exempt, 1 become constants."""
    if is_constexpr or value is None or (isinstance(value, int) and value == 1 and not is_exempt):
        return "constexpr"
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def _is_aligned(value: Any, kind: str) -> bool:
    """Whether a launch finds that 16 divides it: integers by value; torch aligns the memory of its tensors."""
    return kind.startswith("*") or (kind in ("i32", "i64") and value % 16 == 0)


def read_code(usage: str, code: str, shared: int) -> MachineCode:
    """From the texts of `cuobjdump -res-usage` and `nvdisasm -c`, and the shared memory Triton asks for."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    loads = re.findall(r"\b(?:LDG\.|LDGSTS\.)[\w.]*", code)
    return MachineCode(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        wide_loads=sum(".128" in load for load in loads),
        loads=len(loads),
        matrix=len(re.findall(r"\b(?:HGMMA|HMMA|QGMMA)\b", code)),
    )


def _binary_tool(name: str, *arguments: str) -> str:
    """Output of a tool that Triton brings along."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
