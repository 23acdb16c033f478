"""Where figures go: the console, metrics.jsonl and TensorBoard, all from the first rank."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from metro_megatron.files import replace_text

TENSORBOARD_NAMES = {"learning_rate": "learning-rate", "grad_norm": "grad-norm", "loss_scale": "loss-scale"}
"""Megatron-LM's names where the meaning is the same."""


class Report:
    """Writes one object per logged step; a resumed run drops what lies beyond its checkpoint."""

    def __init__(self, run: Path, first_step: int, train_steps: int):
        self.train_steps = train_steps
        self.first_step = first_step
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            replace_text(self.path, "".join(f"{line}\n" for line in lines if _step(line) <= first_step))
        self.file = self.path.open("a")
        self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self.started = time.monotonic()

    def training(self, step: int, figures: dict[str, float]) -> None:
        """Figures of the steps up to `step` (1-based) since the last line."""
        self._write(step, figures)
        done = step - self.first_step
        seconds = (time.monotonic() - self.started) / done * (self.train_steps - step)
        self.say(
            f"step {step}/{self.train_steps} | aux {figures['aux_loss']:.4f} rtd {figures['rtd_loss']:.4f} "
            f"clm {figures['clm_loss']:.4f} | replaced {figures['replace_rate']:.3f} "
            f"found {figures['replace_accuracy']:.3f} | grad norm {figures['grad_norm']:.3f} | "
            f"lr {figures['learning_rate']:.2e} | {figures['tokens_per_second']:,.0f} tokens/s "
            f"(data {figures['data_share']:.1%}) | ETA {_duration(seconds)}"
        )

    def validation(self, step: int, figures: dict[str, float]) -> None:
        """Figures of an evaluation after `step` steps, under names that begin with validation/."""
        self._write(step, {f"validation/{name}": value for name, value in figures.items()})
        self.say(
            f"validation after step {step} | aux {figures['aux_loss']:.4f} rtd {figures['rtd_loss']:.4f} "
            f"clm {figures['clm_loss']:.4f} | RTD AUC {figures['rtd_auc']:.3f} | "
            f"replaced {figures['replace_rate']:.3f} found {figures['replace_accuracy']:.3f}"
        )

    def say(self, line: str) -> None:
        print(line, flush=True)

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()

    def _write(self, step: int, figures: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()
        for name, value in figures.items():
            self.tensorboard.add_scalar(TENSORBOARD_NAMES.get(name, name), value, step)


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a crash
        return 2**62


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
