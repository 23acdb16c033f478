"""A folder of probing tasks, written by tools/make_tasks.py: NAME/train.jsonl, NAME/test.jsonl and manifest.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.probing.kinds import Kind, Row, of_name

MANIFEST = "manifest.json"
SIDES = ("train", "test")
FORMAT = 1
REMEDY = "write the folder with tools/make_tasks.py"


@dataclass(frozen=True)
class ProbeTask:
    """A task as an encoder is asked it."""

    name: str
    kind: Kind
    train: list[Row]
    test: list[Row]
    baselines: dict[str, float]
    """What kind.metric is without an encoder."""

    def first(self, texts: int) -> ProbeTask:
        """Of either side the first rows that have at most so many texts, at least one."""
        cut = [_first(self.kind, rows, texts) for rows in (self.train, self.test)]
        return ProbeTask(self.name, self.kind, *cut, self.baselines)


def encode_rows(rows: Sequence[Row]) -> bytes:
    """JSON Lines of rows."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_tasks(folder: Path, names: Sequence[str] = ()) -> list[ProbeTask]:
    """The tasks of a folder, or those named, in the manifest's order.

    Raises UserError, with all problems, for a folder that is not one of tasks, a task that it has not, files that are
    not those of the manifest, and rows of another form.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, dict[str, Any]] = manifest["tasks"]
        version = manifest["format_version"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {REMEDY}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of tasks ({error!r}); {REMEDY}") from error
    if version != FORMAT:
        raise UserError(f"{path}: has format {version}, this program reads {FORMAT}; {REMEDY}")
    problems = [f"{folder}: has no task {name!r}, but {', '.join(found)}" for name in names if name not in found]
    tasks = []
    for name, facts in found.items():
        if names and name not in names:
            continue
        try:
            kind = of_name(facts.get("kind"))
            train, test = (_read_rows(folder / name / f"{side}.jsonl", kind, facts["sha256"][side]) for side in SIDES)
            tasks.append(ProbeTask(name, kind, train, test, facts["baselines"]))
        except KeyError as error:
            problems.append(f"{path}: task {name!r} has no {error}; {REMEDY}")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    if not tasks:
        raise UserError(f"{path}: lists no task; {REMEDY}")
    return tasks


def _read_rows(path: Path, kind: Kind, sha256: str) -> list[Row]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {REMEDY}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path}: is not the file that {MANIFEST} describes; {REMEDY}")
    rows = []
    for line, text in enumerate(content.decode().splitlines(), start=1):
        row = json.loads(text)
        if problem := kind.problem(row):
            raise UserError(f"{path}, line {line}: {problem}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no rows; {REMEDY} from more text")
    return rows


def _first(kind: Kind, rows: list[Row], texts: int) -> list[Row]:
    count = min(len(rows), texts)
    while count > 1 and len(kind.texts(rows[:count])) > texts:
        count = count * texts // len(kind.texts(rows[:count]))
    return rows[: max(1, count)]
