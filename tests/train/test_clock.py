"""Seconds of steps, without what is no training."""

import pytest

from metro_megatron.train import clock as module
from metro_megatron.train.clock import Clock


def test_the_longest_step_is_known_from_the_first_on_and_a_pause_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    clock, known = Clock(), []
    for seconds in clock.waiting(iter([5.0, 9.0, 2.0])):
        known.append(clock.longest_step)
        pass_by(seconds)
        clock.pause(lambda: pass_by(60.0))
    assert known == [0.0, 5.0, 9.0] and clock.longest_step == 9.0
    assert clock.lap() == (16.0, 0.0, 3)
