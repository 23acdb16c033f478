"""Which runs the campaign has: arms that differ in their objective and see as much text as equal FLOPs pay for.

Runs of one seed share order, masks, noise and all weights that both have: random numbers are functions of the seed and
of what they are for, never of the arm.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metro_megatron.cli.options import flatten, options_of
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import MAY_CHANGE, Config
from metro_megatron.plan.flops import Amount, model_flops

CONFIGS = Path(__file__).parents[2] / "examples" / "campaign"
ARMS = ("metro", "electra", "mlm_15", "mlm_30")
"""Files of CONFIGS, over common.yaml, in the order of runs."""
STEPS_PER_WARM_UP = 16
"""Steps to a step of warm-up, as in examples/demo.yaml: schedules are equal in shares of a run."""


@dataclass(frozen=True)
class Text:
    """What all arms read."""

    train: str
    """Prefix of the shards to train on."""
    validation: str
    """Prefix of the held-out shards."""
    lengths: NDArray[np.int64]
    """[n] tokens of the training samples, <s> and </s> included."""
    sha256: str
    """Of the shards to train on."""

    @property
    def sample(self) -> Amount:
        """The average one."""
        return Amount(float(self.lengths.mean()), float((self.lengths.astype(float) ** 2).mean()), 1.0)


@dataclass(frozen=True)
class PlannedRun:
    """One run of the campaign."""

    arm: str
    options: tuple[str, ...]
    """All that pretrain_metro.py is given, train.output aside."""
    text: Text

    @cached_property
    def config(self) -> Config:
        return parse_config(self.options)

    @property
    def flops(self) -> float:
        """Model FLOPs of all steps, by plan/flops.py."""
        return self.config.train.train_steps * _step_flops(self.config, self.text)

    @property
    def name(self) -> str:
        """Arm, seed, and a hash of all that would make another run of it: the text and every option but layout, rows
        and reporting that is not at its default."""
        values = {
            option.name: value
            for option, value in zip(options_of(Config), flatten(self.config).values(), strict=True)
            if MAY_CHANGE not in option.marks and value != option.default
        }
        made_of = json.dumps([values, self.text.sha256], sort_keys=True)
        return f"{self.arm}-{self.config.train.seed}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"


def planned_runs(text: Text, budget: float, seeds: int, rates: Sequence[float]) -> list[PlannedRun]:
    """All runs in their order: every arm with the first seed, then with the next, so that a campaign that ends early
    has arms to compare. An arm takes the number of steps whose FLOPs are nearest to the budget."""
    arms = {arm: [*_arm_options(arm, text), *_step_options(arm, text, budget)] for arm in ARMS}
    return [
        PlannedRun(arm, (*options, "--optimizer.lr", f"{rate:g}", "--train.seed", str(seed)), text)
        for seed in range(1, seeds + 1)
        for rate in rates
        for arm, options in arms.items()
    ]


def _arm_options(arm: str, text: Text) -> list[str]:
    files = ["--config", str(CONFIGS / "common.yaml"), str(CONFIGS / f"{arm}.yaml")]
    return [*files, "--data.train", text.train, "--data.validation", text.validation]


def _step_options(arm: str, text: Text, budget: float) -> list[str]:
    steps = max(1, round(budget / _step_flops(parse_config(_arm_options(arm, text)), text)))
    return ["--train.train_steps", str(steps), "--optimizer.lr_warmup_steps", str(steps // STEPS_PER_WARM_UP)]


def _step_flops(config: Config, text: Text) -> float:
    return model_flops(config, text.sample * config.train.global_batch_size)
