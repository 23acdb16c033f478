"""A program on a machine that has nothing but what docs/benchmarks.md and the Makefile's WHEELS list.

It imports the modules that it is given, trains two steps of the demo's model, and prints their losses as JSON.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def listed() -> set[str]:
    """Distributions that a bare machine has: by the docs, with all they require, and the carried ones, alone."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    (sentence,) = re.findall(r"needs Python 3.12 with (.*?)\. ", text, re.DOTALL)
    (wheels,) = re.findall(r"^WHEELS := (.*(?:\\\n.*)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    own = {canonicalize_name(name) for name in re.split(r",\s+|\s+and\s+", sentence)}
    return _with_requirements(own) | {canonicalize_name(name) for name in wheels.replace("\\", " ").split()}


def _with_requirements(names: Iterable[str]) -> set[str]:
    found, left = set[str](), list(names)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            requirements = map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:  # of another platform, such as Triton of a CPU's torch
            continue
        left += [canonicalize_name(one.name) for one in requirements if not one.marker or one.marker.evaluate()]
    return found


def main(modules: Sequence[str]) -> None:
    kept = listed() | {"metro-megatron"}
    owners = metadata.packages_distributions()
    absent = {top for top, ones in owners.items() if not kept & {canonicalize_name(one) for one in ones}}

    class Bare(PathFinder):
        """Finds no module of other distributions."""

        @classmethod
        def find_spec(
            cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            return None if fullname.partition(".")[0] in absent else super().find_spec(fullname, path, target)

    sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
    for name in modules:
        import_module(name)
    losses = import_module("benchmarks.same_losses").train("fp32", "cpu", 2)
    print(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1:])
