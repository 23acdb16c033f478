"""What can be compiled is tested in processes of their own: here Triton's interpreter takes the compiler's place."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml

from fused import ahead_of_time
from fused.ahead_of_time import CompileCase, MachineCode, argument_type, meta, obstacle, read_code
from fused.dispatch import LEAST_TRITON, Launch
from tools.compile_kernels import sources

ROOT = Path(__file__).parents[2]
GOOD = MachineCode(registers=64, stack=0, shared=8, spills=0, wide_loads=2, loads=3, matrix=1)


def case(**expectations) -> CompileCase:
    return CompileCase("layer_norm, H 64", Launch(None, (1,), {}), 90, max_registers=64, **expectations)


def test_code_that_is_as_expected():
    assert GOOD.problems(case(tensor_cores=True)) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"registers": 65}, "65 registers, at most 64"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 300_000}, "300,000 bytes of shared memory, the GPU lets a program have 232,448"),
        ({"spills": 2}, "2 loads and stores of spilled"),
        ({"wide_loads": 0}, "no 128-bit load among 3"),
        ({"matrix": 0}, "no matrix instruction"),
    ],
)
def test_each_expectation_is_checked(change, message):
    (problem,) = MachineCode(**{**GOOD.__dict__, **change}).problems(case(tensor_cores=True))
    assert problem.startswith("layer_norm, H 64, sm_90: ") and message in problem


def test_code_is_read():
    usage = "Function k:\n  REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:600"
    code = """
        /*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/ @!P0 LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/ LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0040*/ LDL R1, [R1] ;
        /*0050*/ STL.64 [R1], R2 ;
        /*0060*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/ STG.E.128 desc[UR4][R2.64], R4 ;
    """
    wanted = MachineCode(registers=40, stack=16, shared=99, spills=2, wide_loads=2, loads=3, matrix=1)
    assert read_code(usage, code, 99) == wanted


@pytest.mark.parametrize(
    "value, is_constexpr, wanted",
    [
        (meta(2, 3, dtype=torch.bfloat16), False, "*bf16"),
        (meta(1, dtype=torch.bool), False, "*i1"),
        (None, False, "constexpr"),
        (1, False, "constexpr"),
        (7, True, "constexpr"),
        (2**31 - 1, False, "i32"),
        (2**31, False, "i64"),
        (0.5, False, "fp32"),
    ],
)
def test_types_are_those_of_a_launch(value, is_constexpr, wanted):
    assert argument_type(value, is_constexpr) == wanted


def test_shapes_are_those_of_the_presets():
    models = [yaml.safe_load(path.read_text())["model"] for path in sorted((ROOT / "examples").glob("*.yaml"))]
    full = [model for model in models if model.get("vocab_size") == ahead_of_time.VOCABULARY]
    shapes = sorted({(model["hidden_size"], model["num_attention_heads"]) for model in full})
    assert shapes == list(zip(ahead_of_time.HIDDEN_SIZES, ahead_of_time.HEADS, strict=True))
    assert {hidden // heads for hidden, heads in shapes} == {ahead_of_time.HEAD_DIM}


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "INTERPRETED", True)
    assert "TRITON_INTERPRET is set" in obstacle()


def compiling(tmp_path: Path, *command: str, packages: str = "") -> subprocess.CompletedProcess:
    """Runs a Python program that finds `packages` before those of this environment."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (packages, str(ROOT))))
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)


DOCUMENTED = (ROOT / "docs" / "kernels_compiled.md").read_text()
# One size of each variant of a kernel: the others differ in the numbers of rows, heads and warps.
ONE_SIZE = "K 64|H 768|12 heads|linear"


def test_the_table_of_all_kernels_is_of_these_sources_and_the_pinned_triton():
    """All take minutes; the tool compiles them, and fails where one is not as expected."""
    assert f"from fused/ of sha256 {sources()} with Triton {pinned('triton')} " in DOCUMENTED, (
        "run python tools/compile_kernels.py --output docs/kernels_compiled.md"
    )


@pytest.mark.long
def test_kernels_compile_as_expected_and_as_documented(tmp_path):
    if version("triton") != pinned("triton"):
        pytest.skip(f"the table is of Triton {pinned('triton')}, this is {version('triton')}")
    table = tmp_path / "kernels.md"
    done = compiling(tmp_path, "tools/compile_kernels.py", "--only", ONE_SIZE, "--output", str(table))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert f" kernels, 0 not as expected, table in {table}" in done.stdout
    rows = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 30 and set(rows) <= set(DOCUMENTED.splitlines())


def pinned(package: str) -> str:
    """The release that constraints.txt names."""
    return next(
        line.removeprefix(f"{package}==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith(f"{package}==")
    )


LEAST = ".".join(map(str, LEAST_TRITON)) + ".0"
WORSE = {
    # 32 bytes of spilled registers on sm_90, at most 8 with the pinned release.
    "attention key backward, term, dropout, 32 x 512, K 64",
    # 56 registers on sm_80, where 48 would let one more row share a processor.
    "layer_norm forward, H 768, residual, dropout last",
    # 112 and 108 registers, at most 96 with the pinned release.
    "softmax_dropout backward, 12 heads, 32 x 512",
}
"""What the least release makes less of."""


@pytest.mark.long
def test_kernels_compile_with_the_least_release_of_triton(tmp_path):
    packages = str(tmp_path / "packages")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, f"triton=={LEAST}"]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip finds no triton=={LEAST}: {installed.stderr.strip().splitlines()[-1]}")
    found = compiling(tmp_path, "-c", "import triton; print(triton.__version__)", packages=packages)
    assert found.stdout.strip() == LEAST
    done = compiling(tmp_path, "tools/compile_kernels.py", "--only", ONE_SIZE, packages=packages)
    assert done.returncode in (0, 1) and "compiled " in done.stdout, done.stdout[-3000:] + done.stderr
    bad = [line for line in done.stdout.splitlines() if line.startswith("not as expected")]
    assert {line.removeprefix("not as expected: ").partition(", sm_")[0] for line in bad} == WORSE


@pytest.mark.long
def test_tiles_fit_into_the_shared_memory_of_smaller_gpus(tmp_path):
    """Those that take most of all variants and sizes; what spills there is no concern."""
    attention = "forward, term, dropout.*K (64|128)|(query|key) backward, term, dropout.*K 128"
    largest = f"{attention}|backward, H 2560, residual, bias"
    done = compiling(tmp_path, "tools/compile_kernels.py", "--only", largest, "--architectures", "89", "120")
    assert done.returncode in (0, 1) and "compiled " in done.stdout, done.stdout[-3000:] + done.stderr
    assert "sm_120: warps" in done.stdout and "bytes of shared memory" not in done.stdout


def test_one_kernel_compiles_as_expected(tmp_path):
    done = compiling(tmp_path, "tools/compile_kernels.py", "--only", "column sums, H 768")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "compiled 6 kernels, 0 not as expected" in done.stdout


def test_unknown_kernels_are_named(tmp_path):
    done = compiling(tmp_path, "tools/compile_kernels.py", "--only", "nothing")
    assert done.returncode == 2
    assert "--only nothing: no kernel is called that; there are" in done.stderr and "layer_norm" in done.stderr
    done = compiling(tmp_path, "tools/compile_kernels.py", "--architectures", "75")
    assert done.returncode == 2 and "--architectures 75: it can be 80, 86, 89, 90, 120" in done.stderr
