"""The quickest animals; all of them, and the healthy runs, are `make zoo`'s."""

from __future__ import annotations

import pytest

from tests.zoo.__main__ import verdict
from tests.zoo.faults import FAULTS
from tests.zoo.healthy import HEALTHY
from tests.zoo.lives import life

QUICK = (
    "masks on <s>",
    "always the likeliest word",
    "labels swapped",
    "token table copied, not tied",
    "rate 30 times too high",
)


def test_faults_and_healthy_runs_are_as_many_as_promised() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 20 and len(HEALTHY) >= 20


@pytest.mark.parametrize("name", QUICK)
def test_the_cause_is_named(name: str) -> None:
    fault = next(one for one in FAULTS if one.name == name)
    row, is_right = verdict(fault, life(fault, fault.concerns, steps=20))
    assert is_right, row


@pytest.mark.long
@pytest.mark.parametrize("name", ["seed 2", "128 words"])
def test_nothing_is_said_of_a_healthy_run(name: str) -> None:
    assert life(None, HEALTHY[name]).said == []
