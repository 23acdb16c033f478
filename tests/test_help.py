"""Every command says what it takes: quickly, narrowly, and nothing else."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from metro_megatron.cli.options import options_of
from tests.distributed import run_program

ROOT = Path(__file__).parents[1]
TOOLS = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "pretrain_metro.py", *(ROOT / "tools").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    if "if __name__ == " in path.read_text(encoding="utf-8")
)
WITHOUT_TORCH = [
    "pretrain_metro.py",
    *(tool for tool in TOOLS if tool.startswith("tools/") and tool.count("/") == 1 and "compile" not in tool),
]


def run(tool: str, *options: str, columns: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": columns}
    if not columns:
        del environment["COLUMNS"]
    module = tool.removesuffix(".py").replace("/", ".")
    return subprocess.run(
        [sys.executable, *options, "-m", module, "--help"], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def is_narrow(shown: str) -> bool:
    return shown.startswith("usage: ") and "(type: " in shown and max(map(len, shown.splitlines())) < 100


@pytest.mark.parametrize("tool", TOOLS)
def test_help_is_narrow_and_quiet(tool: str) -> None:
    # Those that load torch take seconds each in a process of their own.
    result = run(tool) if tool in WITHOUT_TORCH else run_program(ROOT / tool, "--help")
    assert (result.returncode, result.stderr) == (0, "") and is_narrow(result.stdout)


@pytest.mark.parametrize("tool", WITHOUT_TORCH)
def test_help_does_not_wait_for_torch_and_is_narrow_in_a_wide_terminal(tool: str) -> None:
    result = run(tool, "-X", "importtime", columns="300")
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "megatron.core", "matplotlib"} and is_narrow(result.stdout)


@pytest.mark.parametrize("name", [Path(tool).stem for tool in WITHOUT_TORCH if "/" in tool])
def test_every_option_is_explained_in_a_sentence(name: str) -> None:
    main = importlib.import_module(f"metro_megatron.commands.{name}").main
    options = options_of(next(iter(get_type_hints(main).values())))
    assert len({option.leaf for option in options}) == len(options)
    assert [option.name for option in options if not option.text.endswith(".")] == []


def test_help_in_a_very_narrow_terminal() -> None:
    result = run("tools/preprocess_data.py", columns="10")
    assert (result.returncode, result.stderr) == (0, "") and "--tokenizer TOKENIZER" in result.stdout
