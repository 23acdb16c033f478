"""What is built for users who have no checkout: every command, preset and module in the wheel, all in the sdist."""

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = "77"
"""The setuptools that pyproject.toml asks for."""
NOT_COPIED = {".git", ".venv", "runs", "data", "build", "metro_megatron.egg-info", ".hypothesis"}
NOT_SHIPPED = {".ci", ".dockerignore", ".gitignore"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, the sdist and the copy of the checkout that they were built from."""
    pytest.importorskip("setuptools", NEEDED)
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=not_copied)
    build = "from setuptools.build_meta import *; build_sdist('..'); build_wheel('..')"
    result = subprocess.run(
        [sys.executable, "-c", build], cwd=folder / "checkout", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Package would be ignored" not in result.stdout + result.stderr
    return folder


def not_copied(folder: str, names: list[str]) -> set[str]:
    """What lies in a checkout and belongs to none."""
    caches = {name for name in names if name == "__pycache__" or name.endswith("_cache")}
    return caches | (NOT_COPIED & set(names) if Path(folder) == ROOT else set())


def python_files(*packages: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for package in packages for path in (ROOT / package).rglob("*.py")}


def test_the_wheel_holds_packages_presets_curves_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        for preset in (ROOT / "examples").glob("*.yaml"):
            assert wheel.read(f"metro_megatron/presets/{preset.name}") == preset.read_bytes()
    curves = {f"metro_megatron/curves/{path.name}" for path in (ROOT / "docs" / "curves").glob("*.csv")}
    presets = {f"metro_megatron/presets/{path.name}" for path in (ROOT / "examples").glob("*.yaml")}
    assert names == python_files("metro_megatron", "fused") | presets | curves | {"metro_megatron/py.typed"}


def test_every_command_of_the_wheel_exists_and_every_command_is_in_it(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        entries = configparser.ConfigParser()
        entries.read_string(wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode())
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    commands = {path.stem for path in (ROOT / "metro_megatron" / "commands").glob("*.py")} - {"__init__"}
    commands.remove("rehearse")  # metro-pretrain --dry_run
    assert dict(entries["console_scripts"]) == {
        f"metro-{name.replace('_', '-')}": f"metro_megatron.commands.{name}:run" for name in commands
    }
    head = message_from_string(metadata)
    assert head["Requires-Python"] == "<3.14,>=3.11"
    assert set(head.get_all("Provides-Extra") or ()) == {"finetune", "demo", "citizen", "parquet", "ray", "te", "dev"}


def test_the_sdist_is_the_checkout(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames() if not sdist.getmember(name).isdir()}
    expected = {
        str(path.relative_to(built / "checkout"))
        for path in (built / "checkout").rglob("*")
        if path.is_file() and not path.is_relative_to(built / "checkout" / "build") and ".egg-info" not in str(path)
    }
    shipped = {name for name in expected if name.partition("/")[0] not in NOT_SHIPPED and "__pycache__" not in name}
    assert shipped - names == set()
    generated = {"PKG-INFO"} | {name for name in names if name.startswith("metro_megatron.egg-info/")}
    presets = {name for name in names if name.startswith("metro_megatron/presets/")}
    curves = {name for name in names if name.startswith("metro_megatron/curves/")}
    assert names - shipped - generated - presets - curves == set()
    assert {Path(name).name for name in presets} >= {path.name for path in (ROOT / "examples").glob("*.yaml")}
