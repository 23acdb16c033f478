"""Every command says what it takes: quickly, narrowly, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "pretrain_metro.py", *(ROOT / "tools").rglob("*.py")]
    if "__main__" in path.read_text(encoding="utf-8")
)
WITHOUT_TORCH = ["pretrain_metro.py", *(tool for tool in TOOLS if tool.count("/") == 1 and "compile" not in tool)]


def run(tool: str, *options: str, columns: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": columns}
    if not columns:
        del environment["COLUMNS"]
    module = tool.removesuffix(".py").replace("/", ".")
    return subprocess.run(
        [sys.executable, *options, "-m", module, "--help"], capture_output=True, text=True, env=environment, cwd=ROOT
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_help_is_narrow_and_quiet(tool: str) -> None:
    for columns in ("", "300") if tool in WITHOUT_TORCH else ("300",):
        result = run(tool, columns=columns)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("usage: ") and "(type: " in result.stdout
        assert max(map(len, result.stdout.splitlines())) < 100


def test_help_in_a_very_narrow_terminal() -> None:
    result = run("tools/preprocess_data.py", columns="10")
    assert (result.returncode, result.stderr) == (0, "") and "--tokenizer TOKENIZER" in result.stdout


@pytest.mark.parametrize("tool", WITHOUT_TORCH)
def test_help_does_not_wait_for_torch(tool: str) -> None:
    result = run(tool, "-X", "importtime")
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "megatron.core", "matplotlib"}
