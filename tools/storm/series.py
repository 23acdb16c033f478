"""The runs of a storm: two series of them, each run compared with the undisturbed one when it has come to its end."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from metro_megatron.checkpoint.files import iteration_folder, tracked_step
from metro_megatron.config.file import parse_config
from metro_megatron.preprocess.run import PreprocessOptions, preprocess
from metro_megatron.tokenizer.training import train_tokenizer
from tools.storm.attempts import Disturbed, Outcome
from tools.storm.comparison import differences
from tools.storm.faults import draw
from tools.storm.journal import Journal, Row
from tools.storm.processes import in_fork

CONFIG = Path(__file__).with_name("storm.yaml")
DOCUMENTS = Path(__file__).parents[2] / "docs"
"""Whose pages are the text."""
ONE_LAYOUT = "one layout"
SERIES = {ONE_LAYOUT: ("data 2",), "other layouts": ("alone", "tensor 2", "pipeline 2", "data 2")}
"""Runs that keep their layout, and runs that get another one at each start."""

OF_CONSOLE = 10_000
"""Characters shown of what a broken attempt said last."""


class Storm:
    """Attempts take turns between the series. All that is known is in the folder: it can go on at any time."""

    def __init__(self, output: Path, journal: Journal, seed: int, has_shim: bool):
        self.output = output
        self.journal = journal
        self.seed = seed
        self.has_shim = has_shim
        self.shards = output / "pages"
        self.straight = output / "undisturbed"
        self.config = parse_config(["--config", str(CONFIG), "--data.train", str(self.shards)])
        self.train_steps = self.config.train.train_steps

    def prepare(self) -> None:
        """Make the shards, and the run that nothing disturbs, if they are not there."""
        if not self.shards.with_name("pages.manifest.json").exists():
            in_fork(self._make_shards)
        if self.journal.undisturbed_seconds is None:
            shutil.rmtree(self.straight, ignore_errors=True)
            print("the undisturbed run", flush=True)
            outcome = self._disturbed(self.straight).attempt("data 2", None, self._console("undisturbed"))
            if tracked_step(self.straight) != self.train_steps:
                raise RuntimeError(f"the undisturbed run failed: {outcome}")
            self.journal.add({"undisturbed": outcome.seconds})

    def next_attempt(self, title: str) -> None:
        """The next fault, in the run of the series whose turn it is."""
        number = len(self.journal.attempts)
        series = list(SERIES)[number % len(SERIES)]
        folder, run = self._run(series)
        fault = draw(self.seed, number, SERIES[series], self.has_shim)
        damaged = self._damaged(series)
        console = self._console(f"{number:04d}")
        outcome = self._disturbed(folder).attempt(fault.layout, fault, console)
        if fault.kind == "flipped bit" and outcome.hit:
            path, sha256 = outcome.where.split("\n")
            damaged[path] = sha256
        _note_corrupt_load(outcome, folder, damaged)
        row = {"attempt": number, "series": series, "run": run, **asdict(fault), **asdict(outcome)}
        self.journal.add({**row, "damaged": damaged})
        print(f"[{title}] {_described(row)}", flush=True)
        if outcome.problems:
            print(console.read_text(errors="replace")[-OF_CONSOLE:], flush=True)
        if tracked_step(folder) == self.train_steps:
            self._compare(series, run, folder)

    def finish(self) -> None:
        """Have runs that are under way come to their end, undisturbed."""
        for series, layouts in SERIES.items():
            folder, run = self._run(series)
            if not folder.exists():
                continue
            damaged = self._damaged(series)
            outcome = self._disturbed(folder).attempt(layouts[0], None, self._console(f"last of {series}"))
            _note_corrupt_load(outcome, folder, damaged)
            self.journal.add({"series": series, "run": run, **asdict(outcome)})
            self._compare(series, run, folder)

    def _compare(self, series: str, run: int, folder: Path) -> None:
        found = differences(folder, self.straight, series == ONE_LAYOUT)
        self.journal.add({"series": series, "run": run, "differences": found})
        print(f"{series}, run {run}: {'; '.join(found) or 'equal to the undisturbed one'}", flush=True)
        if found:
            folder.rename(folder.with_name(f"{folder.name}, differs"))
        else:
            shutil.rmtree(folder)

    def _damaged(self, series: str) -> dict[str, str]:
        """Files of the run under way that are still as they were damaged, with their SHA-256."""
        return {path: sha256 for path, sha256 in self.journal.damaged(series).items() if _is(Path(path), sha256)}

    def _run(self, series: str) -> tuple[Path, int]:
        """Folder and number of the run that is under way, or comes next."""
        number = len(self.journal.ended(series)) + 1
        return self.output / f"{series.replace(' ', '_')}_{number}", number

    def _console(self, name: str) -> Path:
        return self.output / "consoles" / f"{name.replace(' ', '_')}.txt"

    def _disturbed(self, folder: Path) -> Disturbed:
        options = ("--config", str(CONFIG), "--data.train", str(self.shards), "--train.output", str(folder))
        return Disturbed(folder, options, self.journal.undisturbed_seconds or 0.0)

    def _make_shards(self) -> None:
        pages = (page.read_text(encoding="utf-8") for page in sorted(DOCUMENTS.glob("*.md")))
        texts = [paragraph for page in pages for paragraph in page.split("\n\n")]
        source, tokenizer = self.output / "text.jsonl", self.output / "tokenizer"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        train_tokenizer([text.splitlines() for text in texts], self.config.model.vocab_size, tokenizer)
        preprocess(PreprocessOptions([str(source)], str(tokenizer), str(self.shards), workers=1))


def _note_corrupt_load(outcome: Outcome, run: Path, damaged: Mapping[str, str]) -> None:
    loaded = iteration_folder(run, outcome.began)
    if loaded in {Path(path).parent for path in damaged}:
        outcome.problems.append(f"corrupt load: {loaded}")


def _is(path: Path, sha256: str) -> bool:
    """Whether a file is still as it was damaged: its checkpoint may have been written anew, or removed."""
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _described(row: Row) -> str:
    injection = row["injection"]
    how = f" at {injection['call']} {injection['number']}" if injection else ""
    when = "" if row["hit"] else " (too late)"
    last = row["steps"][-1] if row["steps"] else "none"
    return (
        f"{row['kind']}{how}{when}, {row['layout']}: {row['seconds']:.1f} s, from step {row['began']}, last {last}, "
        f"exit code {row['code']}{''.join(f' | {problem}' for problem in row['problems'])}"
    )
