"""A number that changes over a run, as a function of the step: from point to point, written in one line.

    0.15                                                     all the time
    0 -> 5e-4 at step 10,000 -> 0 at 100%                    warm-up and decay
    0 -> 5e-4 at 1% -> 5e-4 at 90% -> 0 at 100% as 1-sqrt    warm-up, stable, decay of another shape than a line
    128 -> 128 at 90% -> 512 at 90%                          a jump, at two points of one position

Learning rate, mask rate, temperature, the weight of a term or of a source, sample length (rounded by whoever asks):
whatever changes by plan. A schedule has no state, so a resumed run sees the numbers of one that was never stopped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from metro_megatron.errors import UserError

Written: TypeAlias = float | str
"""A schedule as a YAML file or a command line gives it: a number, or points. The type of an option that is one."""

Steps: TypeAlias = int | str
"""A number of steps, or their share of the run: 5000 or 10%. The type of an option that is one; see steps_of."""

Shape = Literal["linear", "cosine", "1-sqrt"]
"""How a value goes from one point to the next; x is the share of the way's steps that are done.

linear: x. cosine: (1 - cos(pi x)) / 2. 1-sqrt: sqrt(x), steep at first (Haegele et al., arXiv 2405.18392, who name what
remains).
"""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_POINT = re.compile(
    rf"({_NUMBER})(?: at (?:step ([\d,]{{1,20}})|({_NUMBER})%)(?: as ({'|'.join(get_args(Shape))}))?)?", re.ASCII
)
_STEPS = re.compile(rf"(\d[\d,]{{0,19}})|({_NUMBER})%", re.ASCII)
_REMEDY = "write a number, or points such as 0.3 -> 0.15 at step 10,000 -> 0.1 at 100%"


@dataclass(frozen=True)
class Point:
    """A value and when it is reached."""

    value: float
    position: float
    """Steps done by then; percent of the run's steps if `is_share`."""
    is_share: bool = False
    shape: Shape = "linear"
    """Of the way to it."""

    def step(self, train_steps: int) -> int:
        """Steps done by then in a run of train_steps."""
        return round(self.position / 100 * train_steps) if self.is_share else int(self.position)

    def __str__(self) -> str:
        when = f"{_digits(self.position)}%" if self.is_share else f"step {int(self.position):,}"
        shape = "" if self.shape == "linear" else f" as {self.shape}"
        return f"{_digits(self.value)} at {when}{shape}"


@dataclass(frozen=True)
class Schedule:
    """`start` before the first step, then lines from point to point, straight or of a point's shape; the last value
    stays.

    Two points of one position are a jump: the step that begins there has the second value.
    """

    start: float
    points: tuple[Point, ...] = ()

    @classmethod
    def parse(cls, written: Written) -> Schedule:
        """The schedule that `str` has printed, or a user has written. Raises UserError."""
        first, *others = (_parse_point(part.strip()) for part in str(written).split("->"))
        if isinstance(first, Point):
            raise UserError(f"{written}: the first value is that of step 0 and has no position; {_REMEDY}")
        points = [point for point in others if isinstance(point, Point)]
        if len(points) < len(others):
            raise UserError(f"{written}: every value but the first needs a position; {_REMEDY}")
        return cls(first, tuple(points))

    @classmethod
    def of_steps(cls, values: Sequence[float], starts: Sequence[int]) -> Schedule:
        """Each value from its start on, which are steps done; the first start is 0."""
        jumps = [
            (Point(before, start), Point(value, start))
            for before, value, start in zip(values, values[1:], starts[1:], strict=False)
            if value != before
        ]
        return cls(values[0], tuple(point for jump in jumps for point in jump))

    def __str__(self) -> str:
        return " -> ".join([_digits(self.start), *map(str, self.points)])

    def at(self, step: int, train_steps: int) -> float:
        """Value of 0-based `step` in a run of train_steps.

        A step lies between `step` and `step + 1` steps done, and gets the larger value of the two ends: the first
        step of a warm-up from 0 moves, and so does the last of a decay to 0.
        """
        left, before = 0, self.start
        for point in self.points:
            right, after = point.step(train_steps), point.value
            if step < right:
                done = step + 1 if after > before else step
                if point.shape != "linear":
                    return before + (after - before) * _way(point.shape, (done - left) / (right - left))
                # Weighted by the distances to both ends, so that a line from or to 0 is one product and one
                # division, and a level one its value exactly.
                return before if before == after else (before * (right - done) + after * (done - left)) / (right - left)
            left, before = right, after
        return before

    def jumps(self, train_steps: int) -> list[int]:
        """Steps done when it goes to another value at once."""
        pairs = zip(self.points, self.points[1:], strict=False)
        met = [(one.step(train_steps), other) for one, other in pairs if one.value != other.value]
        return [step for step, other in met if other.step(train_steps) == step]

    def problems(self, name: str, train_steps: int, admitted: Container[float]) -> list[str]:
        """What is wrong with it, called `name`, in a run of train_steps; its values must be among those `admitted`."""
        values = [self.start, *(point.value for point in self.points)]
        found = [f"{name} is {_digits(one)}, must be {admitted}" for one in values if one not in admitted]
        for earlier, later in zip(self.points, self.points[1:], strict=False):
            if later.step(train_steps) < earlier.step(train_steps):
                found.append(
                    f"{name}: {later} comes after {earlier}, but before it in a run of {train_steps:,} steps; "
                    "put the points in order"
                )
        late = [point for point in self.points if point.step(train_steps) > train_steps]
        found += [f"{name}: {point} lies beyond the run's {train_steps:,} steps; 100% is its end" for point in late]
        return found


@dataclass(frozen=True)
class Decay:
    """From `start` towards `end`, steeply at first; u is the share of the run's steps that are done before a step.

    exponential: end + (start - end) exp(-u / constant), which comes close to `end` without reaching it.
    polynomial: end + (start - end) (1 - u)^constant.
    """

    start: float
    end: float
    shape: Literal["exponential", "polynomial"]
    constant: float

    def __str__(self) -> str:
        remaining = {"exponential": "exp(-u / {})", "polynomial": "(1 - u)^{}"}[self.shape]
        return f"{_digits(self.start)} -> {_digits(self.end)} as {remaining.format(_digits(self.constant))}"

    def at(self, step: int, train_steps: int) -> float:
        """Value of 0-based `step` in a run of train_steps; at train_steps and behind it, that of the run's end."""
        share = min(step / train_steps, 1.0)
        is_exponential = self.shape == "exponential"
        remaining = math.exp(-share / self.constant) if is_exponential else (1 - share) ** self.constant
        return self.end + (self.start - self.end) * remaining


def step_window(written: str) -> range:
    """Steps counted from 0, of a window such as 1200-1260, or 1200, counted from 1. Raises UserError."""
    first, _, last = str(written).replace(",", "").partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first)):
        raise UserError(f"{written} is no window of steps; write the first and the last one, such as 1200-1260")
    return range(int(first) - 1, int(last or first))


def steps_of(written: Steps, train_steps: int) -> int:
    """How many steps of a run are meant. Raises UserError for what is neither a number of them nor a share."""
    match = _STEPS.fullmatch(str(written))
    if not match:
        raise UserError(f"{str(written)!r} is neither a number of steps nor a share of the run; write 5000 or 10%")
    steps, share = match.groups()
    if steps is not None:
        return int(steps.replace(",", ""))
    if not 0 <= float(share) <= 100:
        raise UserError(f"{written} is not within a run, which goes from 0% to 100%; write 5000 or 10%")
    return Point(0.0, float(share), is_share=True).step(train_steps)


def _way(shape: Shape, share: float) -> float:
    """How much of the way to a point is done after a share of its steps."""
    return math.sqrt(share) if shape == "1-sqrt" else (1 - math.cos(math.pi * share)) / 2


def _parse_point(text: str) -> Point | float:
    """A point, or a value without position."""
    match = _POINT.fullmatch(text)
    if not match:
        raise UserError(f"{text!r} is not a point of a schedule; {_REMEDY}")
    value, step, share = match.groups()[:3]
    shape = cast(Shape, match[4] or "linear")
    if not math.isfinite(float(value)):
        raise UserError(f"{value} is too large for a number; {_REMEDY}")
    if step is not None and step.strip(","):
        return Point(float(value), int(step.replace(",", "")), shape=shape)
    if share is not None and 0 <= float(share) <= 100:
        return Point(float(value), float(share), is_share=True, shape=shape)
    if step is not None or share is not None:
        raise UserError(f"{text!r} is not within a run, which goes from 0% to 100%; {_REMEDY}")
    return float(value)


def _digits(value: float) -> str:
    """The shortest text that reads back as `value`."""
    return repr(float(value)).removesuffix(".0")
