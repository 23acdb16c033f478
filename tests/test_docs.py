"""The documentation names what is there: every module has its stop in docs/walk.md, every named path exists."""

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = ("metro_megatron", "fused", "tools", "benchmarks", "tests", "docs", "examples")
WRITTEN_BY_BENCHMARKS = re.compile(
    r"docs/benchmarks/((data|early_exit|fast_electra|fused|train)(\.csv|\.json)?|gpu(/summary\.md)?)"
)
"""Named as outputs: without an ending, or before anything was measured."""

FILES = {
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
} | {path.relative_to(ROOT) for path in ROOT.iterdir() if path.is_file()}
PATHS = {one.as_posix() for file in FILES for one in (file, *file.parents)}
ENDS = {"/".join(path.split("/")[first:]) for path in PATHS for first in range(path.count("/") + 1)}
"""Every file and folder by what its path ends with: `train/step.py` is metro_megatron/train/step.py."""

_PATH = re.compile(r"(?<![\w./:-])[\w.-]+(?:/[\w.*-]+)*/?")
_MODULE = re.compile(r"(?<![\w./-])(?:metro_megatron|fused|tools|benchmarks|tests)(?:\.(?!png|md)\w+)+")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def paths_in(text: str) -> Iterator[str]:
    """What looks like a path of this repository: begins with one of its folders, or ends as a Python file."""
    for found in _PATH.findall(text):
        path = found.rstrip(".").removeprefix("../")
        if ("/" in path and path.split("/")[0] in FOLDERS) or path.endswith(".py"):
            yield path


def exists(path: str) -> bool:
    """Whether a file or folder has this path or one that ends so; * stands for anything."""
    path = path.rstrip("/")
    found = bool(fnmatch.filter(ENDS, path)) if "*" in path else path in ENDS
    return found or WRITTEN_BY_BENCHMARKS.fullmatch(path) is not None


def module_exists(name: str) -> bool:
    """Whether a dotted name begins with a module: its last parts may be names in it."""
    parts = name.split(".")
    paths = ["/".join(parts[:length]) for length in range(len(parts), 1, -1)]
    return any(path in PATHS or f"{path}.py" in PATHS for path in paths)


def modules() -> list[str]:
    """Paths of all modules of the library, as the walk names them: below metro_megatron, or fused/..."""
    found = [path for path in PATHS if re.fullmatch(r"(metro_megatron|fused)/.*\.py", path)]
    return sorted(path.removeprefix("metro_megatron/") for path in found if not path.endswith("__init__.py"))


def test_every_module_has_its_stop_in_the_walk() -> None:
    named = set(paths_in((ROOT / "docs" / "walk.md").read_text(encoding="utf-8")))
    named = {path.removeprefix("metro_megatron/") for path in named}
    missing = [path for path in modules() if path not in named]
    assert missing == [], "say in docs/walk.md, where they are met on the way, what they decide"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = [path for path in paths_in(text) if not exists(path)]
    wrong += [name for name in _MODULE.findall(text) if not module_exists(name)]
    wrong += [link for link in _LINK.findall(text) if not (page.parent / link).exists()]
    assert wrong == []


def test_the_reader_of_pages_sees_what_is_wrong() -> None:
    text = "`train/step.py`, `hf/load.py`, [x](docs/none.md); metro_megatron.nowhere, python -m benchmarks.bench_fused."
    assert [path for path in paths_in(text) if not exists(path)] == ["hf/load.py", "docs/none.md"]
    assert [name for name in _MODULE.findall(text) if not module_exists(name)] == ["metro_megatron.nowhere"]
