"""What has been done: one stamp per step, so that a repeated command does only what is missing or has changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import metro_megatron
from metro_megatron.errors import UserError

State = Literal["missing", "started", "done"]

FOLDER = ".stages"


@dataclass(frozen=True)
class Step:
    """One command, with the files and folders that it reads and writes, relative to the folder it runs in."""

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    """Written by this step alone; removed before it starts afresh."""
    resumes: bool = False
    """The command continues from its own half-written outputs."""
    always: bool = False
    """Run it even if nothing has changed."""


class Journal:
    """Stamps in `root`/.stages. `directory` is where commands run and relative paths of steps begin."""

    def __init__(self, root: Path, directory: Path):
        """Raises UserError if root is neither new nor empty nor a folder of this program."""
        self.root = root
        self.directory = directory
        self.folder = root / FOLDER
        if root.exists() and not root.is_dir():
            raise UserError(f"--output {root} is a file; choose a folder")
        if root.is_dir() and any(root.iterdir()) and not self.folder.is_dir():
            raise UserError(f"--output {root} holds files that are not the demonstration's; choose another folder")

    def state(self, step: Step) -> State:
        """done: its stamp fits command and inputs, and its outputs are there; started: it was interrupted since."""
        stamp = self._read(f"{step.name}.json")
        if stamp.get("digest") != self.digest(step):
            return "missing"
        if stamp["state"] == "done" and all((self.directory / path).exists() for path in step.outputs):
            return "done"
        return "started"

    def start(self, step: Step) -> None:
        """Stamp the step as started; outputs that it cannot continue from are removed first."""
        if not (step.resumes and self.state(step) == "started"):
            for path in step.outputs:
                self._remove(self.directory / path)
        self._write(f"{step.name}.json", {"digest": self.digest(step), "state": "started"})

    def finish(self, step: Step) -> None:
        """Stamp the step as done. Raises UserError if an output is not there."""
        missing = [str(path) for path in step.outputs if not (self.directory / path).exists()]
        if missing:
            raise UserError(f"{step.name} ended well, but has not written {', '.join(missing)}; see its log")
        self._write(f"{step.name}.json", {"digest": self.digest(step), "state": "done"})

    def digest(self, step: Step) -> str:
        """What a step's outputs follow from: the command, the contents of its inputs, the program's version."""
        found = hashlib.sha256(json.dumps([metro_megatron.__version__, *step.command]).encode())
        for path in step.inputs:
            found.update(f"{path}\0{content_hash(self.directory / path)}\0".encode())
        return found.hexdigest()

    def seconds(self) -> dict[str, float]:
        """Wall time of every stage that has run, all its attempts together."""
        return self._read("seconds.json")

    def add_seconds(self, stage: str, seconds: float, is_fresh: bool) -> None:
        """Add an attempt's wall time to a stage; forget earlier attempts if nothing of them was used."""
        known = self.seconds()
        earlier = 0.0 if is_fresh else known.get(stage, 0.0)
        self._write("seconds.json", {**known, stage: earlier + seconds})

    def log(self, step: Step) -> Path:
        """Where the step's output is kept."""
        folder = self.root / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{step.name}.log"

    def _remove(self, path: Path) -> None:
        assert path.resolve().is_relative_to(self.root.resolve()) and path.resolve() != self.root.resolve(), path
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a stamp cut short counts as none
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / name)


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of all files in a folder with their names; caches of Python do not count."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files: Sequence[Path] = sorted(one for one in path.rglob("*") if one.is_file() and "__pycache__" not in one.parts)
    parts = [f"{one.relative_to(path)}\0{content_hash(one)}\0" for one in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
