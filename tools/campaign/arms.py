"""Which runs the campaign has: arms that differ in their objective and see as much text as equal FLOPs pay for.

Runs of one seed share order, masks, noise and all weights that both have: random numbers are functions of the seed and
of what they are for, never of the arm.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metro_megatron.cli.options import flatten, options_of
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import MAY_CHANGE, Config
from metro_megatron.plan.flops import Amount, model_flops

CONFIGS = Path(__file__).parents[2] / "examples" / "campaign"
COMMON = (str(CONFIGS / "common.yaml"),)
"""What all arms have in common, unless a campaign has other sizes."""
FEWER_SEEDS = 3


@dataclass(frozen=True)
class Arm:
    """One way of pretraining: a file of CONFIGS over those in common."""

    name: str
    title: str
    """In pictures."""
    most_seeds: int | None = None
    """None: as many as the campaign has."""
    figure: str = "rtd_auc"
    """Of the validation text, by which seed 1 chooses the learning rate: the best detection, or the lowest loss."""
    is_trained: bool = True


ARMS = (
    Arm("metro", "METRO"),
    Arm("electra", "ELECTRA"),
    Arm("mlm_15", "masked LM, 15%", figure="mlm_loss"),
    Arm("mlm_30", "masked LM, 30%", figure="mlm_loss"),
    Arm("fast_electra", "Fast-ELECTRA", FEWER_SEEDS),
    Arm("early_exit", "early exit", FEWER_SEEDS),
    Arm("uniform", "uniform words", FEWER_SEEDS),
    Arm("random_weights", "random weights", FEWER_SEEDS, is_trained=False),
)
"""In the order of runs; fast_electra comes after metro, whose auxiliary it takes."""
AUXILIARY_OF = {"fast_electra": "metro"}
"""Whose run of the same seed gives the frozen auxiliary model."""
UNTRAINED = ("--train.train_steps", "1", "--optimizer.lr", "1e-30", "--optimizer.lr_warmup_steps", "0")
"""A checkpoint takes one step; this rate changes no weight, but for biases of 0, which become as little."""
STEPS_PER_WARM_UP = 16
"""Steps to a step of warm-up, as in examples/demo.yaml: schedules are equal in shares of a run."""


@dataclass(frozen=True)
class Text:
    """What all arms read."""

    train: str
    """Prefix of the shards to train on."""
    validation: str
    """Prefix of the shards that a run evaluates while it trains."""
    lengths: NDArray[np.int64]
    """[n] tokens of the training samples, <s> and </s> included."""
    sha256: str
    """Of the shards to train on."""
    configs: tuple[str, ...] = COMMON
    """Configuration files of all arms, which make samples of the text."""

    @property
    def sample(self) -> Amount:
        """The average one."""
        return Amount(float(self.lengths.mean()), float((self.lengths.astype(float) ** 2).mean()), 1.0)


@dataclass(frozen=True)
class PlannedRun:
    """One run of the campaign."""

    arm: str
    options: tuple[str, ...]
    """All that pretrain_metro.py is given, train.output and corruption.frozen_model aside."""
    text: Text
    waits_for: frozenset[str] = frozenset()
    """Names of the runs that must be finished before it is known that this one is to be done."""
    auxiliary: str = ""
    """Name of the run whose auxiliary fills the masks, frozen; its FLOPs are not among this run's."""
    is_trained: bool = True
    is_chosen: bool = False
    """Whether its rate is that of its arm's comparisons: seed 1's other tries only choose it."""

    @cached_property
    def config(self) -> Config:
        return parse_config(self.options)

    @property
    def flops(self) -> float:
        """Model FLOPs of all steps, by plan/flops.py."""
        return self.config.train.train_steps * _step_flops(self.config, self.text) if self.is_trained else 0.0

    @cached_property
    def name(self) -> str:
        """Arm, seed, and a hash of all that would make another run of it: the text and every option but layout, rows
        and reporting that is not at its default."""
        values = {
            option.name: value
            for option, value in zip(options_of(Config), flatten(self.config).values(), strict=True)
            if MAY_CHANGE not in option.marks and value != option.default
        }
        made_of = json.dumps([values, self.text.sha256, *filter(None, [self.auxiliary])], sort_keys=True)
        return f"{self.arm}-{self.config.train.seed}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"


def planned_runs(
    text: Text, budget: float, seeds: int, rates: Sequence[float], rows: Sequence[Mapping[str, str]] = ()
) -> list[PlannedRun]:
    """All runs in their order: every arm with the first seed at every rate, then with the next at the chosen one, so
    that a campaign that ends early has arms to compare. An arm takes the number of steps whose FLOPs are nearest to the
    budget.

    rows are those of runs that are done. As long as they leave an arm's rate open, the first one stands for it in later
    seeds: such runs are counted, and wait for those of the first seed.
    """
    arms = {arm: [*_arm_options(arm.name, text), *_step_options(arm.name, text, budget)] for arm in ARMS}

    def planned(arm: Arm, seed: int, rate: float) -> PlannedRun:
        given = ("--optimizer.lr", f"{rate:g}") if arm.is_trained else UNTRAINED
        options = (*arms[arm], *given, "--train.seed", str(seed))
        source = next((one for one in ARMS if one.name == AUXILIARY_OF.get(arm.name)), None)
        auxiliary = planned(source, seed, chosen[source]).name if source else ""
        waits_for = {*(tried[arm] if seed > 1 else ()), *((auxiliary, *tried[source]) if source else ())}
        return PlannedRun(arm.name, options, text, frozenset(waits_for), auxiliary, arm.is_trained, seed > 1)

    chosen: dict[Arm, float] = {}
    tried: dict[Arm, list[str]] = {}
    first = []
    for arm in ARMS:
        chosen[arm] = rates[0]  # while its own first runs are planned
        grid = [(rate, planned(arm, 1, rate)) for rate in (rates if arm.is_trained else rates[:1])]
        tried[arm] = [run.name for _, run in grid]
        best = _best_rate(arm, grid, rows)
        chosen[arm] = best or rates[0]
        first += [replace(run, is_chosen=rate == best) for rate, run in grid]
    later = [
        planned(arm, seed, chosen[arm])
        for seed in range(2, seeds + 1)
        for arm in ARMS
        if arm.most_seeds is None or seed <= arm.most_seeds
    ]
    return [*first, *later]


def figure_of(arm: str) -> str:
    """The figure by which an arm's learning rate is chosen."""
    return next(one.figure for one in ARMS if one.name == arm)


def badness(row: Mapping[str, str]) -> float:
    """What chooses a rate: the lower, the better, of the rows of one arm."""
    return float(row["validation"]) * (1 if figure_of(row["arm"]).endswith("_loss") else -1)


def step_flops(arm: str, text: Text) -> float:
    """Model FLOPs of one step of an arm."""
    return _step_flops(parse_config(_arm_options(arm, text)), text)


def _best_rate(arm: Arm, grid: Sequence[tuple[float, PlannedRun]], rows: Sequence[Mapping[str, str]]) -> float | None:
    """The rate whose run is the best; None as long as a run has no row."""
    if len(grid) == 1:
        return grid[0][0]
    found = {row["run"]: row for row in rows}
    if any(run.name not in found for _, run in grid):
        return None
    return min(grid, key=lambda one: badness(found[one[1].name]))[0]


def _arm_options(arm: str, text: Text) -> list[str]:
    files = ["--config", *text.configs, str(CONFIGS / f"{arm}.yaml")]
    return [*files, "--data.train", text.train, "--data.validation", text.validation]


def _step_options(arm: str, text: Text, budget: float) -> list[str]:
    steps = max(1, round(budget / step_flops(arm, text)))
    return ["--train.train_steps", str(steps), "--optimizer.lr_warmup_steps", str(steps // STEPS_PER_WARM_UP)]


def _step_flops(config: Config, text: Text) -> float:
    return model_flops(config, text.sample * config.train.global_batch_size)
