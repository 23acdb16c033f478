"""Curves of healthy runs to compare others with: a run's figures, thinned to a small CSV that says what run it was.

Lines `# name: value` come first: name, seed, commit and every option that is not the default. Then follows a table
whose rows are means over the steps of consecutive log lines: the place of the last of them (step, tokens), and every
figure of training that is drawn.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import metro_megatron
from metro_megatron.cli.options import flatten, options_of
from metro_megatron.config.schema import MAY_CHANGE, Config
from metro_megatron.errors import UserError
from metro_megatron.files import replace_text
from metro_megatron.objective.figures import panels
from metro_megatron.objective.terms import ALL
from metro_megatron.train.curves import Run, covered_steps, over_tokens

CURVES = Path(metro_megatron.__file__).parent / "curves"
"""Those that belong to the program: NAME-SEED.csv."""
MOST_ROWS = 200
PLACES = ("step", "tokens")
HEAD = ("name", "seed", "commit")


@dataclass(frozen=True)
class Reference:
    """One healthy run."""

    name: str
    facts: Mapping[str, str]
    """seed, commit and options, as the file says."""
    columns: Mapping[str, NDArray[np.float64]]
    """[n] by name, step and tokens among them; nan where the run had no figure."""

    @classmethod
    def of(cls, run: Run, name: str, commit: str) -> Reference:
        """Thin out a run. Raises UserError for one without configuration."""
        if run.config is None:
            raise UserError(f"{run.name}: has no run_config.yaml, so nothing says what its curves are of")
        figures = [figure for panel in panels(ALL) for figure in panel.curves if figure in run.training[-1]]
        lines = np.array(
            [
                [line["step"], tokens, *(line.get(one, math.nan) for one in figures)]
                for line, tokens in zip(run.even_lines, run.tokens(run.even_lines), strict=True)
            ]
        )
        steps = covered_steps(lines[:, 0])
        width = math.ceil(len(lines) / MOST_ROWS)
        blocks = [slice(begin, begin + width) for begin in range(0, len(lines), width)]
        rows = np.array(
            [[*lines[one][-1, :2], *np.average(lines[one, 2:], axis=0, weights=steps[one])] for one in blocks]
        )
        facts = {
            "seed": str(run.config.train.seed),
            "commit": commit,
            "data.train": " ".join(Path(prefix).name for prefix in run.config.data.train),
            **_changed(run.config),
        }
        return cls(name, facts, dict(zip([*PLACES, *figures], rows.T, strict=True)))

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Raises UserError for a file that `write` has not written."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            head = [line for line in lines if line.startswith("# ")]
            facts = dict(line[2:].split(": ", 1) for line in head if ": " in line)
            names, *rows = [*csv.reader(line for line in lines if not line.startswith("#"))] or [[]]
            table = np.array([[float(cell or "nan") for cell in row] for row in rows]).T
            columns = dict(zip(names, table, strict=True))
            missing = [one for one in PLACES if one not in columns] + [one for one in HEAD if one not in facts]
            if missing:
                raise ValueError(f"no {', '.join(missing)}")
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"{path}: no reference curve ({error}); write one with tools/plot_run.py --run RUN --output NAME.csv"
            ) from error
        return cls(facts.pop("name"), facts, columns)

    def write(self, path: Path) -> None:
        """The CSV; numbers in five digits."""
        head = [f"# {name}: {value}" for name, value in {"name": self.name, **self.facts}.items()]
        formats = dict.fromkeys(PLACES, "{:.0f}")
        cells = [
            ["" if math.isnan(value) else formats.get(name, "{:.5g}").format(value) for value in column]
            for name, column in self.columns.items()
        ]
        rows = [",".join(row) for row in (self.columns, *zip(*cells, strict=True))]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "\n".join([*head, *rows]) + "\n")


@dataclass(frozen=True)
class Band:
    """Healthy runs that differ in their seeds only; one makes a line."""

    runs: Sequence[Reference]

    @property
    def label(self) -> str:
        first = self.runs[0]
        several = f"{first.name.removesuffix('-' + first.facts['seed'])}, {len(self.runs)} seeds"
        return first.name if len(self.runs) == 1 else several

    def curve(self, figure: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Tokens [n] and, of the runs at each, least, median and largest [3, n]; None without that figure.

        Runs are smoothed as they are drawn, and read between their rows, where all of them have been.
        """
        curves = []
        for run in self.runs:
            values = run.columns.get(figure)
            if values is None or not np.isfinite(values).any():
                return None
            curves.append(over_tokens(run.columns["tokens"], values))
        begin, end = max(tokens[0] for tokens, _ in curves), min(tokens[-1] for tokens, _ in curves)
        at = np.unique(np.concatenate([tokens for tokens, _ in curves]))
        at = at[(at >= begin) & (at <= end)]
        values = np.array([np.interp(at, *curve) for curve in curves])
        return at, np.stack([values.min(0), np.median(values, 0), values.max(0)])


def lacking(shown: Iterable[str], given: Sequence[Band]) -> Iterator[str]:
    """A line where runs show figures that none of the references has: which, and what names have them."""
    there = {name for band in given for run in band.runs for name in run.columns}
    figures = sorted(set(shown) - there)
    if given and figures:
        others = sorted(
            {
                path.stem.rpartition("-")[0]
                for path in CURVES.glob("*-*.csv")
                if set(figures) & {*Reference.read(path).columns}
            }
        )
        remedy = f"; --reference has them as {', '.join(others)}" if others else ""
        yield f"{', '.join(band.label for band in given)}: without {', '.join(figures)}{remedy}"


def reference_names() -> list[str]:
    """What `--reference` takes beside files."""
    return sorted({path.stem.rpartition("-")[0] for path in CURVES.glob("*-*.csv")})


def bands(given: Iterable[str]) -> list[Band]:
    """References by name (all seeds) or as files; those of one configuration are one band.

    Raises UserError for a bare name that is neither, and as Reference.read.
    """
    found: dict[tuple[str, ...], list[Reference]] = {}
    for one in given:
        for path in _paths(one):
            reference = Reference.read(path)
            options = [f"{name}: {value}" for name, value in reference.facts.items() if name not in ("seed", "commit")]
            found.setdefault(tuple(options), []).append(reference)
    return [Band(references) for references in found.values()]


def _paths(given: str) -> list[Path]:
    path = Path(given)
    if path.is_file() or path.name != given or path.suffix:
        return [path]
    if given not in reference_names():
        known = ", ".join(reference_names())
        raise UserError(
            f"--reference {given}: no such file, and no curve that comes with the program; there are {known}"
        )
    return sorted(CURVES.glob(f"{given}-*.csv"))


def _changed(config: Config) -> dict[str, str]:
    """Options that are not the default, but for those that a continued run may change; the seed stands elsewhere."""
    values, defaults = flatten(config), flatten(Config())
    return {
        option.name: str(values[option.name])
        for option in options_of(Config)
        if MAY_CHANGE not in option.marks
        and option.name != "train.seed"
        and values[option.name] != defaults[option.name]
    }
