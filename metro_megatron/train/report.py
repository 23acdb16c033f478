"""Where figures go: the console, metrics.jsonl and TensorBoard, all from the first rank.

Nothing here ends a run: what cannot be written is said and, in metrics.jsonl, written later.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson
import psutil
from torch.utils.tensorboard import SummaryWriter

from metro_megatron.data.loader import PretrainingData
from metro_megatron.files import json_lines, replace_text
from metro_megatron.health.watch import Said
from metro_megatron.objective.term import Term

TENSORBOARD_NAMES = {"learning_rate": "learning-rate", "grad_norm": "grad-norm", "loss_scale": "loss-scale"}
"""Megatron-LM's names where the meaning is the same."""
EVENTS = "events.out.tfevents."
"""Begins the name of each of TensorBoard's files, followed by a time."""


class Report:
    """Writes one object per logged step; a resumed run drops what lies beyond its checkpoint."""

    def __init__(self, run: Path, terms: Sequence[Term], first_step: int, train_steps: int):
        self.terms = terms
        self.train_steps = train_steps
        self.first_step = first_step
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_bytes().splitlines()
            replace_text(self.path, "".join(f"{line.decode()}\n" for line in lines if _step(line) <= first_step))
        self.unwritten = b""
        """Lines of metrics.jsonl for which there was no room so far."""
        self._write_lines()
        self.tensorboard = self._open_tensorboard(run / "tensorboard")
        self.started = time.monotonic()
        self.has_warned = self.has_begun = False

    def training(self, step: int, figures: dict[str, float], digest: int, alarms: Sequence[Said] = ()) -> None:
        """Figures of the steps up to `step` (1-based) since the last line, the digest of what they read, and the alarms
        that they set off."""
        said = {one.alarm.name: one.evidence for one in alarms}
        self._write(step, figures, {"digest": f"{digest:016x}", **({"alarms": said} if said else {})})
        done = step - self.first_step
        seconds = (time.monotonic() - self.started) / done * (self.train_steps - step)
        self.say(
            f"step {step}/{self.train_steps} | {self._losses(figures)} | {self._shares(figures)} "
            f"filled {figures['non_pad_fraction']:.3f} | "
            f"grad norm {figures['grad_norm']:.3f} | "
            f"lr {figures['learning_rate']:.2e} | {figures['tokens_per_second']:,.0f} tokens/s, "
            f"{_utilization(figures)} "
            f"(data {figures['data_share']:.1%}) | ETA {_duration(seconds)}"
        )
        for alarm in alarms:
            self.say(f"warning: step {step}: {alarm.text}")
            self._add("add_text", "alarms", alarm.text, step)

    def validation(self, step: int, figures: dict[str, float]) -> None:
        """Figures of an evaluation after `step` steps, under names that begin with validation/."""
        self._write(step, {f"validation/{name}": value for name, value in figures.items()})
        extra = {label: figures[name] for term in self.terms for label, name in term.validation_console.items()}
        shown = "".join(f"{label} {value:.3f} | " for label, value in extra.items())
        self.say(f"validation after step {step} | {self._losses(figures)} | {shown}{self._shares(figures)}")

    def probes(self, step: int, figures: dict[str, float]) -> None:
        """What frozen features score after `step` steps, by task, under names that begin with probe/."""
        self._write(step, {f"probe/{name}": value for name, value in figures.items()})
        self.say(f"probes after step {step} | {' '.join(f'{name} {value:.3f}' for name, value in figures.items())}")

    def warn_of_padding(self, data: PretrainingData, first: int) -> None:
        """Say once in a run what to change if the steps from the global position `first` are not full."""
        if not self.has_warned and (advice := data.advice(first)):
            self.has_warned = True
            self.say(f"warning: {advice}")

    def has_validation(self, step: int) -> bool:
        """Whether the figures of an evaluation after a step are there."""
        lines = json_lines(self.path, "step")
        return any(line["step"] == step and any(name.startswith("validation/") for name in line) for line in lines)

    def first(self, step: int) -> None:
        """A step is done: of the first one of this process it says when."""
        if self.has_begun:
            return
        self.has_begun = True
        seconds = time.time() - psutil.Process().create_time()
        self.say(f"step {step} done {seconds:.0f} s after the start of the process")

    def say(self, line: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"  # of a console that may lack a character
        try:
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        except OSError:  # nobody reads any more: not even Python at its exit shall try
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def say_all(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.say(line)

    def close(self) -> None:
        if self.tensorboard:
            with suppress(OSError):
                self.tensorboard.close()

    def _losses(self, figures: dict[str, float]) -> str:
        return " ".join(f"{term.name} {figures[f'{term.name}_loss']:.4f}" for term in self.terms)

    def _shares(self, figures: dict[str, float]) -> str:
        shown = {"replaced": "replace_rate"}
        for term in self.terms:
            shown |= term.console
        return " ".join(f"{label} {figures[name]:.3f}" for label, name in shown.items() if name in figures)

    def _write(self, step: int, figures: dict[str, float], more: Mapping[str, Any] = MappingProxyType({})) -> None:
        # orjson writes null for NaN, which JSON has not.
        self.unwritten += orjson.dumps({"step": step, **figures, **more}) + b"\n"
        self._write_lines()
        for name, value in figures.items():
            self._add("add_scalar", TENSORBOARD_NAMES.get(name, name), value, step)

    def _write_lines(self) -> None:
        try:
            with self.path.open("ab", buffering=0) as file:
                self.unwritten = self.unwritten[file.write(self.unwritten) :]
        except OSError as error:
            self.say(f"warning: {self.path}: {error.strerror}; its lines are kept and written when there is room")

    def _add(self, kind: str, *what: Any) -> None:
        """Give TensorBoard something; a writer that fails is left, as it would fail at every call."""
        if self.tensorboard:
            try:
                getattr(self.tensorboard, kind)(*what)
            except Exception as error:  # of its thread, whatever it is
                self.tensorboard = None
                self.say(f"warning: {self.path.parent / 'tensorboard'}: {error}; no more is written there")

    def _open_tensorboard(self, folder: Path) -> SummaryWriter | None:
        """A writer whose file comes after those that are there: TensorBoard reads them in the order of their names,
        which begin with the time, and the clock may have been set back."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted(folder.glob(f"{EVENTS}*"))
            if files and int(files[-1].name.removeprefix(EVENTS).partition(".")[0]) >= int(time.time()):
                for number, path in enumerate(files):
                    rest = path.name.removeprefix(EVENTS).partition(".")[2]
                    path.rename(path.with_name(f"{EVENTS}{number:010d}.{rest}"))
            return SummaryWriter(str(folder), purge_step=self.first_step + 1)
        except (OSError, ValueError) as error:
            self.say(f"warning: {folder}: {error}; nothing is written there")
            return None


def _utilization(figures: dict[str, float]) -> str:
    share = f" (MFU {figures['mfu']:.1%})" if "mfu" in figures else ""
    return f"{figures['tflops_per_gpu']:.3g} TFLOP/s/GPU{share}"


def _step(line: bytes) -> int:
    try:
        return int(orjson.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a crash
        return 2**62


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
