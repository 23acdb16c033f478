"""The lines of a run so far, and what the alarms take from them: means over windows, their noise, gains, rates."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property, partial

from metro_megatron.config.schema import Config
from metro_megatron.health.trivial import detection_entropy
from metro_megatron.schedule import Schedule

LEAST_STEPS = 20
"""Steps that a judgement of a loss or a norm is made over."""
SIGMAS = 5.0
"""Standard deviations: by chance less than once in a million lines."""
SPREAD = 3.0
"""Standard deviation in nats of a masked token's loss, at most about that of word frequencies."""


@dataclass(frozen=True)
class Masks:
    """Of the first rank, since the line before: how many there are and where, beside what is expected of them."""

    count: float = 0.0
    """Less the number that the lengths of samples and objective.mask_probability give."""
    count_variance: float = 0.0
    places: float = 0.0
    """Sum of the masks' distances, in tokens, behind the middles of their samples."""
    places_variance: float = 0.0

    def __add__(self, other: Masks) -> Masks:
        return Masks(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Line:
    """What is known at one log line."""

    step: int
    """Steps done."""
    figures: Mapping[str, float]
    """As they are logged."""
    masked: int
    """Masked tokens since the line before, over all ranks."""
    tokens: int
    """All of them."""
    norms: Sequence[float] = ()
    """Gradient norm of every step since the line before."""
    skipped: int = 0
    """Steps of those that were skipped for gradients that are not finite."""
    unigram: float = 0.0
    """Loss of word frequencies."""
    repeated: float = 0.0
    """Share of the samples that were read before, though the order says that they are new."""
    again: float = 0.0
    """Share whose number came before in the same part of the plan, while the order is in its first epoch."""
    first: int | None = None
    """Its first step, counted from 0."""
    rates: Sequence[float] = ()
    """Main's learning rate in every step since the line before."""
    masks: Masks = Masks()
    weights: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Norm and number of elements of every parameter."""


@dataclass(frozen=True)
class Rated:
    """Weights that one option gives the learning rate of."""

    option: str
    peak: float
    """Its rate."""
    share: float
    """Of the peak, now."""
    update: float
    """Root mean square of a step's elements, as a share of the rate."""
    walk: float
    """That of the sum of n steps along gradients of chance, over sqrt(n): averaged gradients make steps smaller, and
    alike, which in Adam's makes up for each other."""
    memory: float
    """What a step keeps of the average of gradients."""
    rms: float
    """Root mean square of the weights' elements."""


@dataclass(frozen=True)
class History:
    """The lines so far, of this start of the run."""

    config: Config
    lines: Sequence[Line]

    @property
    def last(self) -> Line:
        return self.lines[-1]

    @cached_property
    def part(self) -> tuple[int, int]:
        """Steps done when the plan changed last, and when it will change again: phases, and jumps of schedules."""
        config, steps = self.config, self.config.train.train_steps
        jumps = [one.jumps(steps) for one in config.schedules.values() if isinstance(one, Schedule)]
        changes = sorted({0, *config.phase_starts, *(step for some in jumps for step in some)})
        begin = max(step for step in changes if step < max(self.last.step, 1))
        return begin, min((step for step in changes if step > begin), default=steps)

    @cached_property
    def alike(self) -> Sequence[Line]:
        """The lines since the plan changed last: figures of other samples, masks or rates say nothing of these."""
        begin, _ = self.part
        before = [line.step for line in self.lines if line.step <= begin]
        later = self.lines[len(before) :]
        # A line may have steps of both sides.
        return later[1:] or later if begin and begin not in before else later

    @property
    def settled(self) -> int:
        """Steps after which the warm-up, or a change of the plan, is behind, and Adam has forgotten it."""
        options = self.config.optimizer
        return max(options.lr_warmup_steps, self.part[0]) + int(1 / max(1 - options.adam_beta2, 1e-3))

    @property
    def is_warm(self) -> bool:
        """Whether the window and the one before have settled."""
        return self.last.step - 2 * LEAST_STEPS >= self.settled and len(self._window_before) > 0

    @property
    def is_half_done(self) -> bool:
        """Whether half of the run, and of this part of its plan, is over."""
        return self.is_warm and self.last.step >= max(self.config.train.train_steps, sum(self.part)) / 2

    @property
    def _window_before(self) -> list[Line]:
        return self.window(len(self.alike) - len(self.window()))

    @cached_property
    def settled_windows(self) -> list[list[Line]]:
        """Those before the last one that begin behind `settled`."""
        size = len(self.window())
        windows = (self.window(end) for end in range(size, len(self.alike) - size + 1))
        return [window for window in windows if window[-1].step - LEAST_STEPS >= self.settled]

    def is_falling(self, name: str) -> bool:
        """Whether a loss is lower by a hundredth than in the window before."""
        return self.mean(name) < 0.99 * self.mean(name, self._window_before)

    def gets_below(self, name: str, mark: float) -> bool:
        """Whether a loss falls as in `is_falling`, or gets below a mark before the run's end at its pace since the
        warm-up.
        """
        first, now = self.settled_windows[:1], self.mean(name)
        steps = self.last.step - first[0][-1].step if first else 0
        if not steps:
            return self.is_falling(name)
        pace = (self.mean(name, first[0]) - now) / steps
        return self.is_falling(name) or pace * (self.config.train.train_steps - self.last.step) > now - mark

    def window(self, end: int | None = None) -> list[Line]:
        """The lines of the last LEAST_STEPS steps, or those before line number `end` of `alike`."""
        end = len(self.alike) if end is None else end
        if not end:
            return []
        begin = bisect_right(self.alike, self.alike[end - 1].step - LEAST_STEPS, key=lambda line: line.step)
        return list(self.alike[begin:end])

    @cached_property
    def weightless(self) -> list[str]:
        """Main's terms that the configuration gives no weight."""
        objective = self.config.objective
        return [term for term in objective.main if getattr(objective, f"{term}_weight", 1.0) == 0]

    def settled_means(self, name: str) -> list[float]:
        """Of a figure over each of the settled windows."""
        if name not in self._settled_means:
            self._settled_means[name] = [self.mean(name, window) for window in self.settled_windows]
        return self._settled_means[name]

    @cached_property
    def _settled_means(self) -> dict[str, list[float]]:
        return {}

    def has(self, *names: str) -> bool:
        """Whether these are among the figures, of terms that are learned, and something was counted for them."""
        known = [name for name in names if name in self.last.figures and name.split("_")[0] not in self.weightless]
        return len(known) == len(names) and not any(math.isnan(self.mean(name)) for name in known)

    def is_still(self, model: str) -> bool:
        """Whether since warm-up no matrix of "aux" or "main" has got another norm by a hundredth; not known of a later
        start. A model of which none is known, as it has none of its own, is as still as all are.
        """
        first, last = self.lines[0], self.last
        if first.step > self.settled:
            return False
        moved = {
            name: abs(last.weights[name][0] - then) > 0.01 * then
            for name, (then, _) in first.weights.items()
            if name in last.weights and (_is_of_layers(name) or _is_table(name))
        }
        own = [is_moved for name, is_moved in moved.items() if name.startswith(f"{model}.")]
        return bool(moved) and not any(own or moved.values())

    @cached_property
    def planned_rates(self) -> list[float]:
        """Main's learning rate in each step since the line before, by the configuration."""
        config, steps = self.config, self.config.train.train_steps
        rate, factor = config.optimizer.learning_rate(steps), config.lr_factor
        return [rate.at(step, steps) * factor.at(step, steps) for step in self._steps]

    @property
    def _steps(self) -> range:
        """Since the line before, counted from 0; a line whose step was passed over is missing."""
        before = max(self.last.step - self.config.train.log_interval, 0)
        return range(before if self.last.first is None else self.last.first, self.last.step)

    def farthest(self, name: str) -> float:
        """The most by which the steps since the line before can have changed a parameter's norm: the sum of their own.

        Adam divides an average of gradients by the root of another one of their squares, so that by Cauchy and Schwarz
        no step is larger than (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)) times its rate; Newton and Schulz's
        iteration leaves singular values of at most 1.2, and Muon's step has 0.2 of its rate.
        """
        optimizer = self.config.optimizer
        options = optimizer if _is_mains(name) else optimizer.auxiliary
        peak, most = options.lr, _most_of_adam(options.adam_beta1, options.adam_beta2)
        if options.matrices == "muon" and _is_of_layers(name):
            peak, most = options.muon_lr or options.lr, 0.2 * 1.2
        norm, size = self.last.weights[name]
        larger = max(norm, self.lines[-2].weights[name][0])
        return peak * sum(self.planned_shares(name)) * (most * math.sqrt(size) + options.weight_decay * larger)

    def mean(self, name: str, lines: Sequence[Line] | None = None) -> float:
        """Of a figure over the tokens of a window, but for lines in which nothing was counted; NaN: in none was."""
        lines = self.window() if lines is None else lines
        known = [line for line in lines if not math.isnan(line.figures[name])]
        tokens = sum(line.tokens for line in known)
        return sum(line.figures[name] * line.tokens for line in known) / tokens if tokens else math.nan

    def noise(self, lines: Sequence[Line] | None = None) -> float:
        """SIGMAS standard deviations in nats of a mean over the masked tokens of a window."""
        lines = self.window() if lines is None else lines
        return SIGMAS * SPREAD / math.sqrt(max(sum(line.masked for line in lines), 1))

    def gain(self, term: str, lines: Sequence[Line] | None = None) -> float:
        """By what share of the trivial loss a loss lies below it."""
        trivial = detection_entropy(self.mean("replace_rate", lines)) if term == "rtd" else self.last.unigram
        return 1 - self.mean(f"{term}_loss", lines) / trivial if trivial else 0.0

    @property
    def times_as_large(self) -> float:
        """Weights of main's layers over those of the auxiliary's."""
        main, auxiliary = (
            one.num_layers * one.hidden_size * (4 * one.hidden_size + 2 * one.ffn_hidden_size)
            for one in (self.config.model.main, self.config.model.auxiliary)
        )
        return main / auxiliary

    def knows_words(self, term: str, lines: Sequence[Line] | None = None) -> bool:
        """Whether a language model surely knew more than the frequencies of words."""
        least = max(self.noise(lines), 0.01 * self.last.unigram)
        return self.gain(term, lines) * self.last.unigram > least

    def temperature(self, lines: Sequence[Line]) -> float:
        """Of the last step's draws."""
        steps = self.config.train.train_steps
        return self.config.corruption.sampling_temperature.at(lines[-1].step - 1, steps)

    @property
    def language_terms(self) -> list[str]:
        """The language models among the run's losses: those that word frequencies are the plateau of."""
        return [term for term in ("aux", "clm", "mlm") if self.has(f"{term}_loss") and self._is_plain(term)]

    def _is_plain(self, term: str) -> bool:
        return term != "clm" or self.config.objective.clm == "simplified"

    def planned_shares(self, parameter: str) -> list[float]:
        """A parameter's learning rate in each step since the line before, planned, as a share of its peak."""
        own = None if _is_mains(parameter) else self.config.optimizer.auxiliary_schedule
        if not own:
            return [rate / self.config.optimizer.lr for rate in self.planned_rates]
        factor, steps = self.config.lr_factor, self.config.train.train_steps
        return [factor.at(step, steps) * own.at(step, steps) for step in self._steps]

    def share_of_peak(self, parameter: str) -> float:
        """A parameter's learning rate at the last step, as a share of its peak: main's as it is logged."""
        if self.config.optimizer.auxiliary_schedule and not _is_mains(parameter):
            return self.planned_shares(parameter)[-1]
        return self.last.figures["learning_rate"] / self.config.optimizer.lr

    def rate(self, parameter: str) -> float:
        """A parameter's learning rate under Adam at the last step."""
        options = self.config.optimizer
        return self.share_of_peak(parameter) * (options.lr if _is_mains(parameter) else options.auxiliary.lr)

    @property
    def rated(self) -> Iterator[Rated]:
        """The weights of both models, by what gives their rate; those that are not known are left out."""
        optimizer = self.config.optimizer
        for prefixes, own, prefix in (
            (("tied.", "main."), optimizer, ""),
            (("aux.",), optimizer.auxiliary, "auxiliary_"),
        ):
            weights = {name: one for name, one in self.last.weights.items() if name.startswith(prefixes)}
            matrices = [one for name, one in weights.items() if _is_of_layers(name)]
            others = [one for name, one in weights.items() if _is_table(name)]
            share = self.share_of_peak(prefixes[-1])
            rate = f"optimizer.{prefix}lr" if getattr(optimizer, f"{prefix}lr") else "optimizer.lr"
            adam = partial(Rated, rate, own.lr, share, 1.0, 1.0, own.adam_beta1)
            if own.matrices == "muon":
                named = f"optimizer.{prefix}muon_lr" if own.muon_lr else rate
                kept = own.muon_momentum
                walk = 0.2 * math.sqrt((1 + kept) / (1 - kept))
                muon = partial(Rated, named, own.muon_lr or own.lr, share, 0.2, walk, kept)
                yield from (kind(_rms(some)) for kind, some in ((muon, matrices), (adam, others)) if some)
            elif matrices:
                yield adam(_rms(matrices))


def _most_of_adam(beta1: float, beta2: float) -> float:
    """Of a step's element, as a share of the rate; without bound where gradients are remembered longer than squares."""
    if beta1**2 >= beta2 or beta2 >= 1:
        return math.inf
    return max(1.0, (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2)))


def _is_mains(parameter: str) -> bool:
    """Whether main's options rule it, as they do the tied table."""
    return parameter.startswith(("tied.", "main."))


def _is_of_layers(name: str) -> bool:
    return ".layers." in name and name.endswith(".weight") and "linear" in name and "layer_norm" not in name


def _is_table(name: str) -> bool:
    return name.endswith(("word.weight", "dense.weight"))


def _rms(weights: Sequence[tuple[float, int]]) -> float:
    return math.sqrt(sum(norm**2 for norm, _ in weights) / sum(size for _, size in weights))
