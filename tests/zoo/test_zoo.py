"""The quickest animals; all of them, and the healthy runs, are `make zoo`'s."""

from __future__ import annotations

import tempfile

import pytest

from tests.distributed import run_ranks
from tests.zoo.__main__ import verdict
from tests.zoo.faults import FAULTS
from tests.zoo.healthy import HEALTHY
from tests.zoo.lives import Outcome, life, live, zoo_config

BEFORE_THE_FIRST_STEP = (
    "masks on <s>",
    "order begins again at resume",
    "always the likeliest word",
    "same dropout in every step",
    "CLM sees the originals",
    "RTD sees what was replaced",
    "main sees where masks are",
    "labels swapped",
    "attention scores without gradient",
    "attention does not teach what is below",
    "one MLP does not teach what is below",
    "naming words does not teach the table",
    "reading words does not teach the table",
    "RTD teaches its head alone",
    "three quarters of the words without gradient",
    "gradients never zeroed",
    "auxiliary frozen by accident",
    "a layer frozen by accident",
    "token table copied, not tied",
)


def test_faults_and_healthy_runs_are_as_many_as_promised() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 20 and len(HEALTHY) >= 20


def beginnings(names: tuple[str, ...]) -> list[Outcome]:
    """One process's short lives, one after the other."""
    outcomes = []
    for fault in (one for one in FAULTS if one.name in names):
        config, done = zoo_config(fault.concerns), fault.resumes_after
        with tempfile.TemporaryDirectory() as folder:
            if done:
                live(config, folder, done, "", 7)
            outcomes.append(live(config, folder, done + 1, fault.name, 7))
    return outcomes


def test_causes_are_named_before_the_first_step() -> None:
    (outcomes,) = run_ranks(beginnings, 1, BEFORE_THE_FIRST_STEP)
    faults = [one for one in FAULTS if one.name in BEFORE_THE_FIRST_STEP]
    assert len(faults) == len(BEFORE_THE_FIRST_STEP)
    for fault, outcome in zip(faults, outcomes, strict=True):
        row, is_right = verdict(fault, outcome)
        assert is_right, row


def test_an_alarm_names_the_cause() -> None:
    fault = next(one for one in FAULTS if one.name == "rate 30 times too high")
    row, is_right = verdict(fault, life(fault, fault.concerns, steps=20))
    assert is_right, row


@pytest.mark.long
@pytest.mark.parametrize("name", ["seed 2", "128 words"])
def test_nothing_is_said_of_a_healthy_run(name: str) -> None:
    assert life(None, HEALTHY[name]).said == []
