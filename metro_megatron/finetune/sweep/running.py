"""The runs of a sweep, several at a time, each a process of its own that nothing of the others can touch.

A run's folder, runs/NAME: run.json says what it is, log.txt what it printed, and when it is finished metrics.json and
predictions.jsonl are there, metrics.json last. A killed run leaves none and is started again. Its process inherits the
folder's lock: where it has outlived a killed sweep, the next one waits for it and takes over what it made.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from metro_megatron.errors import UserError
from metro_megatron.files import locked, replace_text
from metro_megatron.finetune.sweep.outcome import METRICS, Outcome, read_outcome
from metro_megatron.finetune.sweep.plan import OUTPUT, TASK, Run

FINETUNE = (sys.executable, "-c", "from metro_megatron.commands.finetune import run; run()")
"""tools/finetune.py, wherever the package is."""
MODEL = "model"
"""What the command writes into a run's folder; its weights are not kept unless asked for."""


@dataclass
class Runner:
    """Does runs that are not finished yet, as many at a time as there are slots."""

    folder: Path
    slots: Sequence[Mapping[str, str]]
    """Environment variables of each run at a time: its GPU, its threads."""
    keep_models: bool = False
    command: Sequence[str] = FINETUNE
    """Takes the options of a run, and --output."""
    _processes: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def outcomes(self, runs: Sequence[Run], on_end: Callable[[Outcome], None]) -> list[Outcome]:
        """Of all runs, in their order; on_end hears of each as it ends, of those that were finished before first.

        A run that ends in an error counts as failed, and is tried again by the next sweep. Raises UserError with a
        run's message where it says that its options or files are wrong, after the runs beside it.
        """
        found: dict[str, Outcome] = {}

        def keep(outcome: Outcome) -> None:
            found[outcome.run.name] = outcome
            on_end(outcome)

        for run in runs:
            if self.is_finished(run):
                keep(read_outcome(run, self.folder / run.name))
        free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        for slot in self.slots:
            free.put(slot)
        with ThreadPoolExecutor(len(self.slots)) as pool:
            futures = [pool.submit(self._in_a_slot, run, free) for run in runs if run.name not in found]
            try:
                for future in as_completed(futures):
                    keep(future.result())
            except UserError:
                pool.shutdown(wait=True, cancel_futures=True)
                ended = [future.result() for future in futures if not future.cancelled() and not future.exception()]
                for outcome in ended:
                    if outcome.run.name not in found:
                        keep(outcome)
                raise
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._terminate()
                raise
        return [found[run.name] for run in runs]

    def is_finished(self, run: Run) -> bool:
        return (self.folder / run.name / METRICS).is_file()

    def has_model(self, run: Run) -> bool:
        """Whether a finished run's model was kept."""
        return (self.folder / run.name / MODEL).is_dir()

    def _in_a_slot(self, run: Run, free: queue.SimpleQueue[Mapping[str, str]]) -> Outcome:
        slot = free.get()
        try:
            return self._do(run, slot)
        finally:
            free.put(slot)

    def _do(self, run: Run, slot: Mapping[str, str]) -> Outcome:
        folder = self.folder / run.name
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", wait=True) as lock:
            if not (folder / MODEL / METRICS).is_file():  # else left by a process that outlived its sweep
                replace_text(folder / "run.json", json.dumps({"sha256": run.digest, **run.values}, indent=2) + "\n")
                words = [*self.command, *run.argv, f"--{OUTPUT}", str(folder / MODEL)]
                code = self._call(words, folder / "log.txt", slot, lock.fileno())
                if code == UserError.EXIT_CODE:
                    raise UserError(f"{folder / 'log.txt'}: {_last_line(folder / 'log.txt')}")
                if code:
                    return Outcome(run, {}, f"{_ending(code)}: {_last_line(folder / 'log.txt')}")
            self._keep(folder, folder / MODEL / ("" if run.column == run.values[TASK] else run.column))
        return read_outcome(run, folder)

    def _call(self, words: Sequence[str], log: Path, slot: Mapping[str, str], lock: int) -> int:
        with log.open("wb") as file:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **slot},
                pass_fds=[lock],
            )
            self._processes.add(process)
            code = process.wait()
            self._processes.discard(process)
        return code

    def _keep(self, folder: Path, made: Path) -> None:
        """Take the figures out of what the command made; metrics.json is last, as it says that all is there."""
        for name in (*sorted(path.name for path in made.glob("predictions*.jsonl")), METRICS):
            partial = folder / f"{name}.partial"
            shutil.copyfile(made / name, partial)
            os.replace(partial, folder / name)
        if not self.keep_models:
            shutil.rmtree(folder / MODEL)

    def _terminate(self) -> None:
        for process in list(self._processes):
            process.terminate()


def slots(workers: int, visible: Sequence[str], cores: int) -> list[dict[str, str]]:
    """Environments of so many runs at a time: GPUs in turn, and a share of the cores each."""
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // workers)))}
    gpus: Iterable[dict[str, str]] = ({"CUDA_VISIBLE_DEVICES": name} for name in visible)
    by_turn = list(gpus) or [{}]
    return [{**threads, **by_turn[number % len(by_turn)]} for number in range(workers)]


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "printed nothing")
