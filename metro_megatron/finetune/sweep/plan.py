"""The runs of a sweep: every combination of the values that options of tools/finetune.py are given."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_origin

from metro_megatron import __version__
from metro_megatron.cli.options import REQUIRED, Option, options_of, out_of_range, read_options, with_values
from metro_megatron.errors import UserError
from metro_megatron.files import file_sha256
from metro_megatron.finetune.tasks import TOGETHER

T = TypeVar("T")
SEED = "seed"
TASK = "task"
OUTPUT = "output"
"""The one option of a run that a sweep gives itself."""
PATHS = ("model", "tokenizer", "data", "train_file", "validation_file", "predict_file")
"""Options that are known by what lies there."""
PACKAGES = ("torch", "transformers")
"""Whose releases are part of what a run is, beside our own."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning of a sweep."""

    given: Mapping[str, Any]
    """What the command line is given."""
    values: Mapping[str, Any]
    """Of every option, given or not, but the output."""
    digest: str = ""
    """SHA-256 of all that makes another run of it."""

    @property
    def name(self) -> str:
        """Of its folder: to read, and, at the end, to know it by."""
        return f"{self.values[TASK]}-{self.values[SEED]}-{self.digest[:12]}"

    @property
    def column(self) -> str:
        """The task that it is shown as: of several learned at once the first."""
        return TOGETHER.get(self.values[TASK], (self.values[TASK],))[0]

    @property
    def argv(self) -> list[str]:
        """The given options as words of a command line."""
        words: list[str] = []
        for name, value in self.given.items():
            words += [f"--{name}", *map(_word, value if isinstance(value, list | tuple) else [value])]
        return words


@dataclass(frozen=True)
class Plan:
    """All runs, in the order in which they are done, and which options differ between them."""

    runs: Sequence[Run]
    varied: Sequence[str] = field(default_factory=tuple)
    """Options of several values, in the order of the command line."""


def read_plan(tokens: Sequence[str], options_class: type) -> Plan:
    """The runs that tokens, options of `options_class` with one value or several, ask for; none is hashed yet.

    Seeds are the outermost loop: when a sweep is stopped early, it has every point of the grid once rather than a few
    of them five times. An option that is a list itself keeps its values together. Raises UserError with all problems.
    """
    known = {option.leaf: option for option in options_of(options_class) if option.leaf != OUTPUT}
    given = read_options(tokens, {name: _several(option) for name, option in known.items()})
    problems = list(given.problems)
    lists: dict[str, list[Any]] = {}
    for leaf, option in known.items():
        if option.name not in given.values:
            continue
        values = given.values[option.name]
        lists[leaf] = [values] if _is_list(option) else values
        for value in lists[leaf]:
            problems += out_of_range({leaf: option}, {option.name: value}, prefix="--")
        repeated = sorted({str(value) for value in lists[leaf] if lists[leaf].count(value) > 1})
        problems += [f"--{leaf} has {value} twice; give each value once" for value in repeated]
    problems += [
        f"--{leaf}: required, but not given; see tools/finetune.py --help"
        for leaf, option in known.items()
        if option.default is REQUIRED and leaf not in lists
    ]
    if problems:
        raise UserError(problems)
    defaults = {leaf: option.default for leaf, option in known.items() if option.default is not REQUIRED}
    order = sorted(lists, key=lambda leaf: leaf != SEED)
    runs = []
    for combination in itertools.product(*(lists[leaf] for leaf in order)):
        chosen = dict(zip(order, combination, strict=True))
        chosen = {leaf: chosen[leaf] for leaf in lists}
        runs.append(Run(chosen, {**defaults, **chosen}))
    return Plan(runs, tuple(leaf for leaf, values in lists.items() if len(values) > 1))


def hashed(plan: Plan) -> Plan:
    """The plan with the digest of every run: options, contents of the files and folders that they name, releases.

    A path is known by what lies there, so that a sweep may be moved; a model folder by its files but for its card.
    Raises UserError for paths of one option that hold the same: their runs would be one.
    """
    versions = {"metro_megatron": __version__, **{name: version(name) for name in PACKAGES}}
    sha256 = cache(_sha256)

    def content(name: str, value: Any) -> Any:
        is_there = name in PATHS and value and Path(value).exists()
        return {"sha256": sha256(Path(value).resolve())} if is_there else value

    problems = []
    for name in PATHS:
        same: dict[str, list[str]] = {}
        for value in dict.fromkeys(run.values.get(name) for run in plan.runs):
            if isinstance(found := content(name, value), dict):
                same.setdefault(found["sha256"], []).append(str(value))
        problems += [
            f"--{name} {' '.join(values)}: these hold the same; give one of them"
            for values in same.values()
            if len(values) > 1
        ]
    if problems:
        raise UserError(problems)

    def digest(run: Run) -> str:
        values = {name: content(name, value) for name, value in run.values.items()}
        return hashlib.sha256(json.dumps([values, versions], sort_keys=True).encode()).hexdigest()

    return replace(plan, runs=[replace(run, digest=digest(run)) for run in plan.runs])


def options_of_run(run: Run, options_class: type[T]) -> T:
    """The options that the run's process will have, but for the output."""
    values = {option.name: run.values.get(option.leaf, "") for option in options_of(options_class)}
    return with_values(options_class, values)


def _sha256(path: Path) -> str:
    """Of a file, or of all files below a folder with their names."""
    if path.is_file():
        return file_sha256(path)
    found = hashlib.sha256()
    for one in sorted(path.rglob("*")):
        if one.is_file() and one.name != "README.md" and "__pycache__" not in one.parts:
            found.update(f"{one.relative_to(path)} {_sha256(one)}\n".encode())
    return found.hexdigest()


def _is_list(option: Option) -> bool:
    return get_origin(option.annotation) in (list, tuple)


def _several(option: Option) -> Option:
    return option if _is_list(option) else replace(option, annotation=list[option.annotation])  # type: ignore[name-defined]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
