"""Schedules: exact values, one text form, hostile input, and an option that is one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metro_megatron.cli.options import Range, at_least, options_of, parse_value, read_options, with_values
from metro_megatron.config.file import dump_config, load_config
from metro_megatron.config.schema import Config, CorruptionConfig, OptimizerConfig, TrainConfig
from metro_megatron.errors import UserError
from metro_megatron.schedule import Point, Schedule, Written, steps_of

WARMUP_DECAY = Schedule(0.0, (Point(5e-4, 10_000), Point(0.0, 125_000)))


def linear_rate(step: int, options: OptimizerConfig, train_steps: int) -> float:
    """The learning rate before it was a schedule."""
    warmup = options.lr_warmup_steps
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * max(train_steps - step, 0) / max(train_steps - warmup, 1)


@pytest.mark.parametrize(
    ("lr", "warmup", "train_steps"),
    [
        (5e-4, 10_000, 125_000),
        (0.1, 3, 10),  # 0.1 * 3 / 3 is not 0.1
        (1e-3, 0, 1000),
        (1.9999e-5, 777, 777),
        (3e-4, 1, 4001),
        (2e-4, 0, 1),
        (2e-4, 1, 1),
    ],
)
def test_the_learning_rate_is_bit_equal_to_its_old_formula(lr: float, warmup: int, train_steps: int) -> None:
    options = OptimizerConfig(lr=lr, lr_warmup_steps=warmup)
    schedule = options.learning_rate(train_steps)
    assert not schedule.problems("learning rate", train_steps, at_least(0))
    for step in range(train_steps + 3):
        assert schedule.at(step, train_steps) == linear_rate(step, options, train_steps), step


def test_values_of_lines_jumps_and_shares() -> None:
    assert [Schedule(0.15).at(step, 4) for step in range(6)] == [0.15] * 6
    falling = Schedule.parse("0.5 -> 0.25 at 50%")
    assert [falling.at(step, 8) for step in range(9)] == [0.5, 0.4375, 0.375, 0.3125, *[0.25] * 5]
    rising = Schedule.parse("1 -> 3 at step 4 -> 3 at step 6 -> 7 at step 6")
    assert [rising.at(step, 10) for step in range(10)] == [1.5, 2, 2.5, 3, 3, 3, 7, 7, 7, 7]
    assert Schedule.parse("128 -> 128 at 90% -> 512 at 90%").at(8, 10) == 128
    assert Schedule.parse("128 -> 128 at 90% -> 512 at 90%").at(9, 10) == 512
    assert Schedule.parse("1 -> 2 at 0%").at(0, 10) == 2


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
"""What remains at share x of a decay: the closed forms of the papers."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("decay", "begin"), [("100%", 100), ("20%", 800), (150, 850), ("1,000", 100)])
def test_warm_up_stable_decay(shape: Any, decay: str | int, begin: int) -> None:
    options = OptimizerConfig(lr=3e-4, lr_warmup_steps=100, lr_decay_steps=decay, lr_decay_style=shape)
    schedule = options.learning_rate(1000)
    assert schedule == Schedule.parse(str(schedule)) and not schedule.problems("rate", 1000, at_least(0))
    rates = [schedule.at(step, 1000) for step in range(1000)]
    assert rates[:100] == pytest.approx([3e-4 * (step + 1) / 100 for step in range(100)], rel=1e-14)
    assert set(rates[99 : begin + 1]) == {3e-4}
    remaining = [SHAPES[shape]((step - begin) / (1000 - begin)) for step in range(begin, 1000)]
    assert rates[begin:] == pytest.approx([3e-4 * one for one in remaining], rel=1e-12)
    assert rates == sorted(rates[:100]) + sorted(rates[100:], reverse=True) and rates[-1] > 0


def test_a_rate_that_never_falls() -> None:
    options = OptimizerConfig(lr=3e-4, lr_warmup_steps=2, lr_decay_steps=0)
    assert [options.learning_rate(6).at(step, 6) for step in range(6)] == [1.5e-4, *[3e-4] * 5]


def test_a_rise_of_another_shape_mirrors_the_fall() -> None:
    rising = Schedule.parse("0 -> 4 at step 4 as cosine")
    falling = Schedule.parse("4 -> 0 at step 4 as cosine")
    assert [rising.at(step, 4) for step in range(4)] == pytest.approx([falling.at(3 - step, 4) for step in range(4)])


@pytest.mark.parametrize(
    ("written", "expected"),
    [("5000", 5000), (5000, 5000), ("5,000", 5000), ("10%", 20_000), ("0.1%", 200), (0, 0), ("100%", 200_000)],
)
def test_steps_are_a_number_or_a_share(written: str | int, expected: int) -> None:
    assert steps_of(written, 200_000) == expected


@pytest.mark.parametrize("written", ["", ",", "ten", "-5", -5, "1.5", "101%", "-1%", "5 as cosine", "9" * 30, True])
def test_other_steps_are_refused(written: str | int) -> None:
    with pytest.raises(UserError, match="write 5000 or 10%"):
        steps_of(written, 1000)


def test_a_resumed_run_sees_the_same_values() -> None:
    """The value depends on the step alone: not on earlier calls, not on the object."""
    whole = [WARMUP_DECAY.at(step, 125_000) for step in range(0, 125_000, 997)]
    resumed = Schedule.parse(str(WARMUP_DECAY))
    assert [resumed.at(step, 125_000) for step in reversed(range(0, 125_000, 997))] == whole[::-1]


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SHAPE = st.sampled_from(list(SHAPES))
POINTS = st.builds(Point, NUMBERS, st.integers(0, 10**12), st.just(False), SHAPE) | st.builds(
    Point, NUMBERS, st.floats(0, 100), st.just(True), SHAPE
)


@given(NUMBERS, st.lists(POINTS, max_size=4))
def test_what_is_printed_parses_equal(start: float, points: list[Point]) -> None:
    schedule = Schedule(start, tuple(points))
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.parse(yaml.safe_load(yaml.safe_dump(str(schedule)))) == schedule


def test_the_text_form() -> None:
    assert str(WARMUP_DECAY) == "0 -> 0.0005 at step 10,000 -> 0 at step 125,000"
    assert Schedule.parse("0->5e-4 at step 10000 ->  0 at step 125,000") == WARMUP_DECAY
    assert str(Schedule.parse(".3 -> -1.50 at 12.5%")) == "0.3 -> -1.5 at 12.5%"
    assert Schedule.parse(0.15) == Schedule.parse("0.15") == Schedule.parse("15e-2") == Schedule(0.15)
    assert str(Schedule.parse(50)) == "50"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", "'' is not a point"),
        ("fast", "'fast' is not a point"),
        ("0.1 ->", "'' is not a point"),
        ("0.1 -> 0.2", "every value but the first needs a position"),
        ("0.1 at 10% -> 0.2 at 20%", "the first value is that of step 0"),
        ("0.1 -> 0.2 at 50", "'0.2 at 50' is not a point"),
        ("0.1 -> 0.2 at step 50%", "is not a point"),
        ("0.1 -> 0.2 at step -5", "is not a point"),
        ("0.1 -> 0.2 at step 1.5", "is not a point"),
        ("0.1 -> 0.2 at step ,", "not within a run"),
        ("0.1 -> 0.2 at step " + "9" * 5000, "is not a point"),
        ("0.1 -> 0.2 at 101%", "not within a run, which goes from 0% to 100%"),
        ("0.1 -> 0.2 at -1%", "not within a run"),
        ("0.1 -> 0.2 at 1e999%", "not within a run"),
        ("1e999", "1e999 is too large"),
        ("٣ -> 1 at 50%", "is not a point"),
        ("1_0", "is not a point"),
        (float("nan"), "'nan' is not a point"),
        (float("inf"), "'inf' is not a point"),
        (True, "'True' is not a point"),
    ],
)
def test_hostile_text_is_explained(written: Written, expected: str) -> None:
    with pytest.raises(UserError, match="write a number, or points such as") as caught:
        Schedule.parse(written)
    assert expected in str(caught.value)


def test_points_out_of_order_beyond_the_run_and_out_of_range() -> None:
    schedule = Schedule.parse("1 -> 2 at step 600 -> 3 at 50% -> 4 at step 2000")
    assert schedule.problems("mask rate", 1000, Range(2, 4)) == [
        "mask rate is 1, must be at least 2 and less than 4",
        "mask rate is 4, must be at least 2 and less than 4",
        "mask rate: 3 at 50% comes after 2 at step 600, but before it in a run of 1,000 steps; put the points in order",
        "mask rate: 4 at step 2,000 lies beyond the run's 1,000 steps; 100% is its end",
    ]
    assert schedule.problems("mask rate", 4000, at_least(1)) == []


def test_the_configuration_prints_its_schedules_and_loads_back(tmp_path) -> None:
    config = Config(optimizer=OptimizerConfig(lr=1e-5, lr_warmup_steps=0), train=TrainConfig(train_steps=30))
    for one, line in (
        (Config(), f"learning rate: {WARMUP_DECAY}"),
        (config, "learning rate: 1e-05 -> 0 at step 30"),
    ):
        text = dump_config(one)
        assert f"\n  # {line}\n" in text.partition("\noptimizer:\n")[2].partition("\nparallel:\n")[0]
        (tmp_path / "a.yaml").write_text(text)
        assert load_config(tmp_path / "a.yaml") == one
    assert str(config.schedules["optimizer.learning_rate"]) == "1e-05 -> 0 at step 30"


@dataclass(frozen=True)
class Objective:
    """What a section with scheduled options would look like."""

    mask_probability: Written = 0.15
    """Share of a sample's tokens that are masked."""
    rtd_weight: Written = "0 -> 50 at 10%"
    """Weight of replaced token detection."""


@pytest.mark.parametrize("written", ["0.15", "0.3 -> 0.15 at step 1,000", "1e-1", "0.3 -> 0.2 at 50% -> 0.2 at 100%"])
def test_a_term_weight_or_the_mask_rate_can_be_a_schedule(written: str) -> None:
    """An option of type `Written` takes a number or points from both command line and YAML, and is dumped as it is."""
    given = read_options(["--mask_probability", written], {option.name: option for option in options_of(Objective)})
    from_yaml = parse_value(yaml.safe_load(f"mask_probability: {written}")["mask_probability"], Written)
    assert not given.problems
    assert given.values["mask_probability"] == from_yaml
    objective = with_values(Objective, given.values)
    schedule = Schedule.parse(objective.mask_probability)
    assert schedule == Schedule.parse(written)
    assert yaml.safe_load(yaml.safe_dump(objective.mask_probability)) == objective.mask_probability
    assert not schedule.problems("objective.mask_probability", 2000, Range(0, 1, has_low=False))
    assert Schedule.parse(objective.rtd_weight).at(49, 1000) == 25


def test_a_temperature_falls_as_fast_electra_has_it() -> None:
    exponential = CorruptionConfig(temperature_schedule="exponential", temperature=2.0).sampling_temperature
    wanted = {0: 2.00, 50: 1.607, 100: 1.368, 200: 1.135, 300: 1.050, 500: 1.007, 1000: 1.00005}
    assert {step: exponential.at(step, 1000) for step in wanted} == pytest.approx(wanted, abs=5e-4)
    assert str(exponential) == "2 -> 1 as exp(-u / 0.1)"
    polynomial = CorruptionConfig(temperature_schedule="polynomial", temperature=3.0).sampling_temperature
    assert [polynomial.at(step, 4) for step in range(5)] == [3.0, 2.125, 1.5, 1.125, 1.0]
    assert str(polynomial) == "3 -> 1 as (1 - u)^2"
    linear = CorruptionConfig(temperature_schedule="linear", temperature=3.0).sampling_temperature
    assert [linear.at(step, 4) for step in range(5)] == [3.0, 2.5, 2.0, 1.5, 1.0]
    constant = CorruptionConfig(temperature=1.5).sampling_temperature
    assert {constant.at(step, 4) for step in range(5)} == {1.5}


def test_a_temperature_is_shown_where_it_falls() -> None:
    cooling = CorruptionConfig(temperature_schedule="exponential", temperature=2.0)
    assert "  # sampling temperature: 2 -> 1 as exp(-u / 0.1)\n" in dump_config(Config(corruption=cooling))
    assert "sampling temperature:" not in dump_config(Config())
