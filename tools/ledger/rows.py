"""A line of the ledger, and its verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from metro_megatron.cli.options import flatten
from metro_megatron.config.file import parse_config
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config

ROOT = Path(__file__).parents[2]
SIZES = {"base": "base", "base_pp": "base++", "large_pp": "large++", "xl": "XL", "xxl": "XXL"}
"""The paper's name of what a preset trains."""
EQUAL, DIFFERS, NOT_RUN = "equal", "differs", "not run"


@dataclass(frozen=True)
class Row:
    """One thing that a paper says."""

    what: str
    paper: str
    ours: str
    verdict: str
    """Begins with one of the three words."""


@dataclass(frozen=True)
class Section:
    """A table, a figure or an abstract."""

    title: str
    rows: Sequence[Row]
    command: str = "make ledger"
    """What produced the verdicts."""
    note: str = ""


@lru_cache
def load(*files: str) -> Config:
    """Presets by name, and files of examples/ over them. Raises AssertionError where the configuration has problems."""
    paths = [file if "/" not in file else str(ROOT / "examples" / file) for file in files]
    config = parse_config(["--config", *paths, "--data.train", "shards", "--train.output", "run"])
    found = problems(config, config.parallel.model_ranks)
    assert not found, found
    return config


def compared(what: str, wanted: Mapping[str, object], config: Config, paper: str = "") -> Row:
    """Options and the values that a paper gives them."""
    options = flatten(config)
    ours = {name: options[name] for name in wanted}
    wrong = [f"{name} is {_shown(ours[name])}" for name, value in wanted.items() if ours[name] != value]
    shown = ", ".join(f"{name} {_shown(value)}" for name, value in ours.items())
    return Row(what, paper or _values(wanted), shown, f"{DIFFERS}: {', '.join(wrong)}" if wrong else EQUAL)


def _values(wanted: Mapping[str, object]) -> str:
    return ", ".join(_shown(value) for value in wanted.values())


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
