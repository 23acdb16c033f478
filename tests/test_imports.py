"""Imports point downward only; what must run without megatron-core does; collectives have their places."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top down: a room may import rooms of lower rows, never one of its own row.
LAYERS = (
    ("pretrain_metro", "tools", "benchmarks"),
    ("metro_megatron.commands",),
    ("metro_megatron.rehearsal",),
    (
        "metro_megatron.train",
        "metro_megatron.finetune",
        "metro_megatron.inspection",
        "metro_megatron.tasks",
        "metro_megatron.machine",
    ),
    ("metro_megatron.checkpoint", "metro_megatron.evaluate", "metro_megatron.preprocess", "metro_megatron.health"),
    ("metro_megatron.corruption",),
    ("metro_megatron.objective",),
    ("metro_megatron.model", "metro_megatron.hf", "metro_megatron.probing"),
    ("metro_megatron.parallel", "metro_megatron.tokenizer"),
    ("metro_megatron.mcore", "metro_megatron.data", "metro_megatron.plan", "metro_megatron.text"),
    ("metro_megatron.config",),
    (
        "metro_megatron.cli",
        "metro_megatron.files",
        "metro_megatron.nvidia",
        "metro_megatron.randomness",
        "metro_megatron.schedule",
        "metro_megatron.vocabulary",
        "fused",
    ),
    ("metro_megatron.errors",),
)

WITHOUT_MEGATRON = (
    "metro_megatron.config",
    "metro_megatron.cli",
    "metro_megatron.plan",
    "metro_megatron.text",
    "metro_megatron.tokenizer",
    "metro_megatron.preprocess",
    "metro_megatron.probing",
    "metro_megatron.tasks",
    "metro_megatron.data.samples",
    "metro_megatron.data.shards",
    "metro_megatron.checkpoint.files",
    "metro_megatron.checkpoint.read",
    "metro_megatron.checkpoint.resume",
    "metro_megatron.evaluate",
    "metro_megatron.hf",
    "metro_megatron.finetune",
    "fused",
    "metro_megatron.commands",
    "tools.compile_kernels",
)

WITH_COLLECTIVES = (
    "metro_megatron.parallel",
    "metro_megatron.objective",
    "metro_megatron.corruption",
    "metro_megatron.checkpoint",
    "metro_megatron.health",
    "metro_megatron.train",
    "metro_megatron.rehearsal",
    "benchmarks.bench_checkpoint",
    "benchmarks.plain_pair",
)

COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
}


@dataclass(frozen=True)
class Import:
    line: int
    name: str
    """Dotted name of a module, or of something in one."""
    at_load: bool
    """False inside functions, and where only type checkers look."""


@dataclass(frozen=True)
class Source:
    path: Path
    name: str
    is_package: bool
    tree: ast.Module

    def imports(self) -> Iterator[Import]:
        late = set(_late_nodes(self.tree))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(node.lineno, alias.name, node not in late)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                for alias in node.names:
                    yield Import(node.lineno, f"{base}.{alias.name}", node not in late)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name.split(".")[: None if self.is_package else -1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])


def _late_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        is_late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if is_late or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from ast.walk(node)


def read(path: Path, root: Path = ROOT) -> Source:
    parts = list(path.relative_to(root).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    return Source(path, name, is_package, ast.parse(path.read_text(encoding="utf-8"), str(path)))


def sources() -> dict[str, Source]:
    folders = [ROOT / folder for folder in ("metro_megatron", "fused", "tools", "benchmarks")]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return {source.name: source for source in map(read, sorted(paths))}


SOURCES = sources()


def in_package(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(name: str) -> tuple[int, str] | None:
    """Number of its row, and its room."""
    rooms = ((number, room) for number, row in enumerate(LAYERS) for room in row)
    return next(((number, room) for number, room in rooms if in_package(name, room)), None)


def forbidden_imports(source: Source) -> list[str]:
    """Imports that point upward, or into another room of the same row."""
    own = room_of(source.name)
    if own is None:
        return []
    return [
        f"{source.path.name}:{one.line} imports {one.name}"
        for one in source.imports()
        if (other := room_of(one.name)) is not None and other != own and other[0] <= own[0]
    ]


def loaded_modules(name: str, seen: set[str]) -> Iterator[str]:
    """Every module, ours and others', that importing ours loads before any function is called."""
    source = SOURCES.get(name)
    if source is None or name in seen:
        return
    seen.add(name)
    for one in source.imports():
        if one.at_load:
            yield one.name
            parts = one.name.split(".")
            for end in range(1, len(parts) + 1):
                yield from loaded_modules(".".join(parts[:end]), seen)


def test_every_module_has_a_room():
    packages = {"metro_megatron", "tools"}
    assert [name for name in SOURCES if room_of(name) is None and name not in packages] == []


def test_imports_point_downward():
    assert [problem for source in SOURCES.values() for problem in forbidden_imports(source)] == []


def test_fused_knows_tensors_only():
    allowed = {"torch", "triton", "fused"}
    standard = __import__("sys").stdlib_module_names
    foreign = [
        f"{source.name}:{one.line} imports {one.name}"
        for name, source in SOURCES.items()
        if in_package(name, "fused")
        for one in source.imports()
        if one.name.split(".")[0] not in allowed and one.name.split(".")[0] not in standard
    ]
    assert foreign == []


@pytest.mark.parametrize("package", WITHOUT_MEGATRON)
def test_runs_without_megatron_core(package):
    for name in SOURCES:
        if in_package(name, package):
            assert [one for one in loaded_modules(name, set()) if in_package(one, "megatron")] == [], name


def test_collectives_have_their_places():
    misplaced = [
        f"{name}:{node.lineno} calls {node.attr}"
        for name, source in SOURCES.items()
        if not any(in_package(name, package) for package in WITH_COLLECTIVES)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute)
        and node.attr in COLLECTIVES
        and ast.unparse(node.value) in ("dist", "torch.distributed", "distributed")
    ] + [
        f"{name}:{one.line} imports {one.name}"
        for name, source in SOURCES.items()
        if not any(in_package(name, package) for package in WITH_COLLECTIVES)
        for one in source.imports()
        if one.name in {f"torch.distributed.{collective}" for collective in COLLECTIVES}
    ]
    assert misplaced == []


def test_the_exported_modeling_files_stand_alone():
    """They are copied into the Hugging Face folder, where metro_megatron is not installed."""
    allowed = set()
    for name in ("configuration_metro", "positions_metro", "encoder_metro", "heads_metro", "modeling_metro"):
        source = SOURCES.get(f"metro_megatron.hf.{name}")
        assert source is not None, name
        ours = {one.name for one in source.imports() if one.name.split(".")[0] in ("metro_megatron", "fused")}
        assert {one.removeprefix("metro_megatron.hf.").split(".")[0] for one in ours} <= allowed, ours
        allowed.add(name)


def test_no_module_is_called_utils():
    assert [name for name in SOURCES if name.rpartition(".")[2] in ("utils", "helpers", "common", "misc")] == []


def test_the_parser_sees_relative_late_and_upward_imports(tmp_path):
    folder = tmp_path / "metro_megatron" / "data"
    folder.mkdir(parents=True)
    path = folder / "bad.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from . import order\n"
        "from ..model.layer import Layer\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import metro_megatron.train.step\n"
        "def f():\n    import tools.plan\n"
    )
    source = read(path, tmp_path)
    assert forbidden_imports(source) == [
        "bad.py:3 imports metro_megatron.model.layer.Layer",
        "bad.py:6 imports metro_megatron.train.step",
        "bad.py:8 imports tools.plan",
    ]
    by_name = {one.name: one.at_load for one in source.imports()}
    assert by_name["metro_megatron.data.order"] and by_name["metro_megatron.model.layer.Layer"]
    assert not by_name["metro_megatron.train.step"] and not by_name["tools.plan"]
