"""Every Triton kernel at every preset's shapes to machine code of A100 and H100, without a GPU."""

import importlib
import pkgutil
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import fused
from fused.ahead_of_time import ARCHITECTURES, CompileCase, MachineCode, compile_case, obstacle
from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError

Results = dict[tuple[str, int], tuple[CompileCase, MachineCode]]

COLUMNS: dict[str, Callable[[CompileCase, MachineCode], object]] = {
    "warps": lambda case, code: case.launch.num_warps,
    "registers": lambda case, code: code.registers,
    "stack": lambda case, code: code.stack,
    "spills": lambda case, code: code.spills,
    "shared": lambda case, code: f"{code.shared:,}",
    "128-bit loads": lambda case, code: f"{code.wide_loads} of {code.loads}",
    "matrix": lambda case, code: code.matrix,
}


@dataclass(frozen=True)
class Options:
    """What to compile, and where it is told."""

    output: str = ""
    """Markdown table to write, such as docs/kernels_compiled.md; none by default."""
    only: str = ""
    """Compile only the kernels whose names contain this, such as layer_norm or "H 768"."""


def main(options: Options) -> int:
    """Compile the kernels as the operators launch them, and check registers, stack, spills, loads and matrix use.

    Needs Triton and no GPU. Exit code 1 where a kernel is not what its file expects.
    """
    output, only = options.output, options.only
    if problem := obstacle():
        raise UserError(problem)
    cases = [case for case in all_cases() if only in case.name]
    if not cases:
        names = ", ".join(sorted({case.name.partition(",")[0] for case in all_cases()}))
        raise UserError(f"--only {only}: no kernel is called that; there are {names}")
    results: Results = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for number, (case, code) in enumerate(zip(cases, pool.map(_compile, _places(cases)), strict=True), 1):
            results[case.name, case.architecture] = case, code
            figures = ", ".join(f"{title} {show(case, code)}" for title, show in COLUMNS.items())
            print(f"{number} of {len(cases)}: {case.name}, sm_{case.architecture}: {figures}", flush=True)
    problems = [problem for case, code in results.values() for problem in code.problems(case)]
    if output:
        Path(output).write_text(table(results, only), encoding="utf-8")
    for problem in problems:
        print(f"not as expected: {problem}")
    made = f", table in {output}" if output else "; --output docs/kernels_compiled.md writes the table"
    print(f"compiled {len(cases)} kernels, {len(problems)} not as expected{made}")
    return 1 if problems else 0


def all_cases() -> list[CompileCase]:
    """The cases of every module of fused that has some."""
    names = sorted(module.name for module in pkgutil.iter_modules(fused.__path__))
    modules = [importlib.import_module(f"fused.{name}") for name in names]
    return [case for module in modules if hasattr(module, "compile_cases") for case in module.compile_cases()]


def _places(cases: Sequence[CompileCase]) -> list[int]:
    places = {(case.name, case.architecture): place for place, case in enumerate(all_cases())}
    return [places[case.name, case.architecture] for case in cases]


def _compile(place: int) -> MachineCode:
    """In a process of its own, to which a kernel cannot be sent."""
    return compile_case(all_cases()[place])


def table(results: Results, only: str) -> str:
    """Markdown: one line per kernel and shape, figures of the architectures side by side."""
    command = "python tools/compile_kernels.py --output docs/kernels_compiled.md" + (
        f' --only "{only}"' if only else ""
    )
    sides = " / ".join(f"sm_{one}" for one in ARCHITECTURES)
    lines = [
        "# Kernels as compiled",
        "",
        f"Made by `{command}`",
        f"with Triton {version('triton')} on {platform.machine()}, without a GPU: what was made of each kernel",
        f"for {sides}, or one figure where they agree. Registers and stack bytes are a thread's, shared memory bytes",
        "a program's; spills are instructions that use thread-local memory; 128-bit loads count those from global",
        "memory; matrix instructions are HMMA on sm_80 and HGMMA on sm_90. None of this is a measurement of speed.",
        "",
        "| kernel | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for name in dict.fromkeys(name for name, _ in results):
        both = [results[name, one] for one in ARCHITECTURES if (name, one) in results]
        lines.append(f"| {name} | " + " | ".join(side_by_side(both, show) for show in COLUMNS.values()) + " |")
    return "\n".join([*lines, ""])


def side_by_side(both: Sequence[tuple[CompileCase, MachineCode]], show: Callable[..., object]) -> str:
    """One figure where the architectures agree, else both."""
    return " / ".join(dict.fromkeys(str(show(*one)) for one in both))


if __name__ == "__main__":
    run_tool(main)
