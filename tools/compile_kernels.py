"""Every Triton kernel at every preset's shapes to machine code of A100, H100 or another GPU, without one."""

import hashlib
import importlib
import platform
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import fused
from fused.ahead_of_time import ARCHITECTURES, SHARED, CompileCase, MachineCode, cases_for, compile_case, obstacle
from fused.dispatch import OPERATOR_NAMES
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
    """Compile only the kernels in whose names this regular expression is found, such as layer_norm or "H 768|K 64"."""
    architectures: list[int] = field(default_factory=lambda: list(ARCHITECTURES))
    """What to compile for, of 80, 86, 89, 90 and 120 (sm_80, ...); those but 80 and 90 have the tile sizes of 80."""


def main(options: Options) -> int:
    """Compile the kernels as the operators launch them, and check registers, stack, spills, loads and matrix use.

    Needs Triton and no GPU. Exit code 1 where a kernel is not what its file expects.
    """
    output, only, architectures = options.output, options.only, options.architectures
    if problem := obstacle():
        raise UserError(problem)
    if unknown := set(architectures) - set(SHARED):
        raise UserError(f"--architectures {sorted(unknown)[0]}: it can be {', '.join(map(str, SHARED))}")
    cases = all_cases(architectures)
    indices = [index for index, case in enumerate(cases) if re.search(only, case.name)]
    if not indices:
        names = ", ".join(sorted({case.name.partition(",")[0] for case in cases}))
        raise UserError(f"--only {only}: no kernel is called that; there are {names}")
    results: Results = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        codes = pool.map(partial(_compile, architectures), indices)
        for number, (index, code) in enumerate(zip(indices, codes, strict=True), 1):
            case = cases[index]
            results[case.name, case.architecture] = case, code
            figures = ", ".join(f"{title} {show(case, code)}" for title, show in COLUMNS.items())
            print(f"{number} of {len(indices)}: {case.name}, sm_{case.architecture}: {figures}", flush=True)
    problems = [problem for case, code in results.values() for problem in code.problems(case)]
    if output:
        Path(output).write_text(table(results, options), encoding="utf-8")
    for problem in problems:
        print(f"not as expected: {problem}")
    made = f", table in {output}" if output else "; --output docs/kernels_compiled.md writes the table"
    print(f"compiled {len(indices)} kernels, {len(problems)} not as expected{made}")
    return 1 if problems else 0


def all_cases(architectures: Sequence[int]) -> list[CompileCase]:
    """The cases of every operator."""
    operators = [importlib.import_module(f"fused.{name}") for name in OPERATOR_NAMES]
    cases = [case for operator in operators for case in operator.compile_cases()]
    return [case for one in architectures for case in cases_for(cases, one)]


def _compile(architectures: Sequence[int], index: int) -> MachineCode:
    """In a process of its own, to which a kernel cannot be sent."""
    return compile_case(all_cases(architectures)[index])


def table(results: Results, options: Options) -> str:
    """Markdown: one line per kernel and shape, figures of the architectures side by side."""
    command = "python tools/compile_kernels.py --output docs/kernels_compiled.md"
    if options.only:
        command += f' --only "{options.only}"'
    if options.architectures != list(ARCHITECTURES):
        command += f" --architectures {' '.join(map(str, options.architectures))}"
    sides = " / ".join(f"sm_{one}" for one in options.architectures)
    lines = [
        "# Kernels as compiled",
        "",
        f"Made by `{command}`",
        f"from fused/ of sha256 {sources()} with Triton {version('triton')} on {platform.machine()}, without a GPU:",
        f"what was made of each kernel for {sides}, or one figure where they agree. Registers and stack bytes are a",
        "thread's, shared memory bytes a program's; spills are instructions that use thread-local memory; 128-bit",
        "loads count those from global memory; matrix instructions are HGMMA on sm_90 and HMMA elsewhere. None of",
        "this is a measurement of speed.",
        "",
        "| kernel | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for name in dict.fromkeys(name for name, _ in results):
        both = [results[name, one] for one in options.architectures if (name, one) in results]
        lines.append(f"| {name} | " + " | ".join(side_by_side(both, show) for show in COLUMNS.values()) + " |")
    return "\n".join([*lines, ""])


def sources() -> str:
    """The beginning of the sha256 of fused's files, in the order of their names: tells whether a table is of these."""
    files = sorted(Path(fused.__path__[0]).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def side_by_side(both: Sequence[tuple[CompileCase, MachineCode]], show: Callable[..., object]) -> str:
    """One figure where the architectures agree, else both."""
    return " / ".join(dict.fromkeys(str(show(*one)) for one in both))


if __name__ == "__main__":
    run_tool(main)
