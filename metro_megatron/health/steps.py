"""The signs in steps, as signs.py has them in losses: what is read and drawn, gradients, and where weights get."""

from __future__ import annotations

import math
from statistics import median

from metro_megatron.health.history import LEAST_STEPS, SIGMAS, History, Masks

FADED = 0.05
"""Share of the peak rate, below which steps have lost four of FP32's 24 bits, and weights may stand in any run."""
ROUNDED = 2**-20
"""Rate, as a share of weights, of which FP32's 24 bits leave four."""


def not_finite(history: History) -> str | None:
    last = history.last
    steps = max(len(last.norms), 1)
    # fp16 finds its scale by overflows, all those before the first step too; of other formats one is too many.
    allowed = steps / 2 + _steps_before_any(history) if history.config.train.precision == "fp16" else 0
    return f"{last.skipped} of {steps} steps skipped" if last.skipped > allowed else None


def _steps_before_any(history: History) -> int:
    """How many steps of the line lie before the first one whose gradient was finite."""
    if any(math.isfinite(norm) for line in history.lines[:-1] for norm in line.norms):
        return 0
    norms = history.last.norms
    return next((number for number, norm in enumerate(norms) if math.isfinite(norm)), len(norms))


def loss_scale_at_floor(history: History) -> str | None:
    options, scale = history.config.optimizer, history.last.figures["loss_scale"]
    if history.config.train.precision != "fp16" or scale > options.min_loss_scale:
        return None
    return f"loss scale {scale:g}, optimizer.min_loss_scale is {options.min_loss_scale:g}"


def norm_spike(history: History) -> str | None:
    """One gradient outweighs all that Adam remembers when (1 - beta2) k^2 > 1, k times the usual one, after clipping.

    A spike of k^2 is told even if it was clipped.
    """
    before = [norm for line in history.alike[:-1] for norm in line.norms if math.isfinite(norm)][-100:]
    now = [norm for norm in history.last.norms if math.isfinite(norm)]
    if len(before) < LEAST_STEPS or not now:
        return None
    options, usual, largest = history.config.optimizer, median(before), max(now)
    ratio = 1 / math.sqrt(max(1 - options.adam_beta2, 1e-12))
    clip = options.clip_grad or math.inf
    harms = min(largest, clip) > ratio * min(usual, clip) or largest > ratio**2 * usual
    return f"gradient norm {largest:.3g}, usual {usual:.3g}" if harms and usual > 0 else None


def no_gradient(history: History) -> str | None:
    """Not of a step that had nothing to learn, as one without masks: then it is that of both, and of no other step."""
    zero = [name for name in ("shared_grad_norm", "stage_grad_norm") if history.last.figures.get(name) == 0]
    is_chance = len(zero) == 2 and (any(history.last.norms) or not history.last.masked)
    return f"{' and '.join(zero)} 0" if zero and not is_chance else None


def rate_too_high(history: History) -> str | None:
    """A step moves a weight by about so much of the rate, and averages over 1 / (1 - memory) steps: in these it must
    not rewrite the weights.
    """
    for one in history.rated:
        step, most = one.share * one.peak * one.update, (1 - one.memory) * one.rms
        if step > most:
            return f"{one.option}: steps of {step:.2g}, weights of {one.rms:.2g}: more than {most:.2g}"
    return None


def rate_not_planned(history: History) -> str | None:
    """The steps since the line before, of which some may have been passed over, have others than they have by plan."""
    if not history.last.norms:
        return None
    left = iter(history.planned_rates)
    for now in history.last.rates or [history.last.figures["learning_rate"]]:
        if not any(math.isclose(now, one, rel_tol=1e-6) for one in left):
            return f"{now:.3g}, planned up to {max(history.planned_rates):.3g}"
    return None


def moved_too_far(history: History) -> str | None:
    """No step of the optimizer's rule at the planned rates, however gradients are, gets there."""
    if len(history.lines) < 2:
        return None
    now, before = history.last.weights, history.lines[-2].weights
    for name in (one for one in now if one in before):
        far, most = abs(now[name][0] - before[name][0]), history.farthest(name)
        if far > 1.001 * most + 1e-6 * before[name][0]:
            return f"{name}: norm {before[name][0]:.3g} to {now[name][0]:.3g}, by {most:.2g} at most"
    return None


def masks_not_planned(history: History) -> str | None:
    """Each sample's number of masks is drawn by itself, and each of its tokens is as likely to be masked."""
    masks = sum((line.masks for line in history.window()), Masks())
    if abs(masks.count) > SIGMAS * math.sqrt(masks.count_variance) + 0.5:
        return f"{abs(masks.count):.0f} masks too {'many' if masks.count > 0 else 'few'}"
    if abs(masks.places) > SIGMAS * math.sqrt(masks.places_variance) + 0.5:
        return f"masks lie too near to the {'ends' if masks.places > 0 else 'beginnings'} of samples"
    return None


def not_as_drawn(history: History) -> str | None:
    """What main finds replaced are the masks whose draw is not the original, to the last one.

    Where the watch has seen each step whose figures are in the line.
    """
    last = history.last
    if len(history.lines) < 2 or last.skipped or not history.has("sampled_accuracy", "replace_rate"):
        return None
    drawn = last.masked * (1 - last.figures["sampled_accuracy"])
    read = last.tokens * last.figures["replace_rate"]
    return f"{read:.0f} tokens replaced, {drawn:.0f} drawn" if abs(read - drawn) > 0.5 else None


def epsilon_rules(history: History) -> str | None:
    """Adam is itself where a gradient's element is larger than epsilon."""
    size = sum(size for _, size in history.last.weights.values())
    if not size or not history.last.norms:
        return None
    options = history.config.optimizer
    element = min(median(history.last.norms), options.clip_grad or math.inf) / math.sqrt(size)
    return f"epsilon {options.adam_eps:.2g}, a gradient's element {element:.2g}" if element < options.adam_eps else None


def decay_rules(history: History) -> str | None:
    """Decayed weights tend to a size of sqrt(rate / (2 decay)) times what steps add up to, as a share of the rate,
    within 1 / (rate decay) steps (Kosson et al. 2023)."""
    decay, steps = history.config.optimizer.weight_decay, history.config.train.train_steps
    for one in history.rated:
        if one.peak * decay * steps < 1:
            continue
        rest = one.walk * math.sqrt(one.peak / (2 * decay))
        if rest < one.rms / 2:
            return f"weights of {one.rms:.2g} tend to {rest:.2g}, by {one.option}"
    return None


def frozen(history: History) -> str | None:
    """FP32 rounds away a step of less than 2^-24 of a weight: first where gradients are below adam_eps, as the step is
    that share of the rate. What the optimizer leaves out stands at any rate, so it is looked for at higher ones.
    """
    if len(history.lines) < 2:
        return None
    now, before = history.last, history.lines[-2]
    if now.skipped >= len(now.norms):
        return None
    same = [
        name
        for name in now.weights
        if before.weights.get(name, (None,))[0] == now.weights[name][0]
        and history.share_of_peak(name) >= FADED
        and history.rate(name) >= ROUNDED * now.weights[name][0] / math.sqrt(now.weights[name][1])
        and not name.startswith(tuple(f"main.{term}_head." for term in history.weightless))
    ]
    # Rows that no step has read leave a norm as it was only if there are no others; decay alone would change it.
    return f"{', '.join(same[:3])}{' and others' if len(same) > 3 else ''}" if same else None


def repeated(history: History) -> str | None:
    """Shards hold copies, of which up to half is taken; no order gives a sample twice in an epoch."""
    if history.last.again:
        return f"{history.last.again:.0%} of the samples for the second time in an epoch"
    share = history.last.repeated
    return f"{share:.0%} of the samples" if share > 0.5 else None
