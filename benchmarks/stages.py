"""Commands in order, each with a time limit, whose ends are written down at once, so that nothing finished is lost.

What has passed is not run again while the machine, the versions and the commit stay. What has failed is, since packages
and drivers may be mended, but after all that has not been tried.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.provenance import ROOT
from benchmarks.results import Row
from metro_megatron.files import replace_text

PASSED, FAILED, STOPPED, SKIPPED, NOT_RUN = "passed", "failed", "stopped", "skipped", "not run"
TRIED = (FAILED, STOPPED)
"""Ends of what ran and did not pass."""
PATIENCE_S = 10.0
"""Between asking a command to end and ending it."""
LEAST_S = 15.0
"""With less time left a stage is not begun."""


@dataclass(frozen=True)
class Stage:
    """One command."""

    name: str
    """Its files are NAME.log and others that begin so."""
    what: str
    command: Callable[[float], Sequence[str]]
    """From the seconds it may take."""
    limit_s: float
    obstacle: str = ""
    """Why it cannot run here."""


class Record:
    """How the stages in a folder ended: `stages.json`."""

    def __init__(self, folder: Path, head: Mapping[str, str]):
        """head: commit, device, versions and command of this call; its date and command may differ in the next."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.head = folder, dict(head)
        self._path = folder / "stages.json"
        earlier = json.loads(self._path.read_text()) if self._path.exists() else {}
        same = _identity(earlier.get("head", {})) == _identity(self.head)
        self.rows: dict[str, Row] = {row["stage"]: row for row in earlier.get("stages", ())} if same else {}

    def result(self, stage: Stage) -> str:
        """How the same command ended; empty where it has not been here."""
        row = self.rows.get(stage.name, {})
        return row.get("result", "") if row.get("command") == _words(stage) else ""

    def note(self, stage: Stage, result: str, seconds: float = 0.0, note: str = "") -> None:
        row = {"stage": stage.name, "result": result, "seconds": round(seconds, 1), "note": note}
        self.rows[stage.name] = {**row, "what": stage.what, "command": _words(stage)}
        content = {"head": self.head, "stages": list(self.rows.values())}
        replace_text(self._path, json.dumps(content, indent=1) + "\n")


def run_stages(stages: Sequence[Stage], record: Record, budget_s: float) -> Iterator[Stage]:
    """Run what has not passed within budget_s seconds, and yield each stage when its end is in the record."""
    deadline = time.monotonic() + budget_s
    stages = sorted(stages, key=lambda stage: record.result(stage) in TRIED)
    for number, stage in enumerate(stages, 1):
        left = deadline - time.monotonic()
        limit = min(stage.limit_s, left)
        title = f"[{number}/{len(stages)}] {stage.name}: {stage.what}"
        before = record.result(stage)
        if before == PASSED:
            print(f"{title} | passed before", flush=True)
        elif stage.obstacle:
            record.note(stage, SKIPPED, note=stage.obstacle)
            print(f"{title} | skipped: {stage.obstacle}", flush=True)
        elif left < LEAST_S and before in TRIED:
            print(f"{title} | {before} before, not run again: the time was up", flush=True)
        elif left < LEAST_S:
            record.note(stage, NOT_RUN, note="the time was up (--budget_s); the same command goes on here")
            print(f"{title} | not run: the time was up", flush=True)
        else:
            print(f"{title} | at most {limit:.0f} s of {left:.0f}", flush=True)
            result, seconds, note = _run(stage, record.folder, limit)
            record.note(stage, result, seconds, note)
            print(f"    {result} after {seconds:.0f} s{note and f': {note}'}", flush=True)
        yield stage


def _run(stage: Stage, folder: Path, limit_s: float) -> tuple[str, float, str]:
    """Result, seconds and a remark: the last line that was printed, or the limit."""
    for old in folder.glob(f"{stage.name}.*"):
        old.unlink()
    # Asked to end by SIGINT, Python unwinds; a shell starts what it runs in the background deaf to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log, started = folder / f"{stage.name}.log", time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            list(stage.command(limit_s)), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, process_group=0,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": _python_path()},
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return STOPPED, time.monotonic() - started, f"at its limit of {limit_s:.0f} s"
        finally:
            _end(process)
    seconds, last = time.monotonic() - started, _last_line(log)
    return (PASSED, seconds, last) if code == 0 else (FAILED, seconds, f"exit code {code}: {last}")


def _end(process: subprocess.Popen) -> None:
    """End a command that still runs, kindly if it listens, and what it has started, in process groups of its own."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        for one in (*children, process):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(children, PATIENCE_S)  # the next stage wants their memory
    process.wait()


def _python_path() -> str:
    """This checkout, then what was there: carried packages."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _words(stage: Stage) -> str:
    return " ".join(stage.command(stage.limit_s))


def _identity(head: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in head.items() if name not in ("date", "command")}
