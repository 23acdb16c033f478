"""The signs that alarms go by: each a pure function of the log lines so far, to what shows an illness now, in figures.

None: nothing does. Their marks come from something: what a model gets that knows frequencies only, the spread of a mean
over so many tokens, how long Adam remembers; none was fitted to a size or a corpus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from metro_megatron.health.history import LEAST_STEPS, SIGMAS, History, Masks
from metro_megatron.health.trivial import chance_of_auc, detection_entropy

TOO_GOOD = 0.9
"""Share of the masked words, or of the nats that frequencies leave open, that a model of text does not get to know."""
LEAST_MASKS = 100
"""Masks that what a model knows is judged by."""
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


def rate_too_low(history: History) -> str | None:
    """Nothing is learned, and a model's weights are nearly those of the start."""
    if not history.is_warm:
        return None
    for model, signs in (
        ("aux", (_above_frequencies, _on_frequencies)),
        ("main", (_above_frequencies, _on_frequencies, _says_original, _corrects_nothing)),
    ):
        if history.is_still(model):
            terms = _terms(history, model)
            seen = next((said for sign in signs if (said := sign(history, terms))), None)
            if seen:
                return f"norms of {model}'s weights within 1% of their start's; {seen}"
    return None


def _terms(history: History, *models: str) -> list[str]:
    """The losses of models."""
    return [term for term in ("aux", "clm", "mlm", "rtd") if ("aux" if term == "aux" else "main") in models]


def _moving(history: History) -> list[str]:
    """The losses of models that do not stand still, which is told already."""
    return _terms(history, *(model for model in ("aux", "main") if not history.is_still(model)))


def weightless(history: History) -> str | None:
    return ", ".join(f"objective.{term}_weight is 0" for term in history.weightless) or None


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


def worse_than_frequencies(history: History) -> str | None:
    return None if loss_fell_back(history) else _above_frequencies(history, _moving(history))


def _above_frequencies(history: History, terms: Sequence[str]) -> str | None:
    if not history.is_warm:
        return None
    for term in (one for one in history.language_terms if one in terms):
        loss, trivial = history.mean(f"{term}_loss"), history.last.unigram
        if loss > max(trivial + history.noise(), 1.02 * trivial) and not history.gets_below(f"{term}_loss", trivial):
            return f"{term} loss {loss:.3f}, that of word frequencies {trivial:.3f}"
    if "rtd" not in terms or not history.has("rtd_loss"):
        return None
    trivial = detection_entropy(history.mean("replace_rate"))
    if history.gain("rtd") < -_detection_mark(history) and not history.gets_below("rtd_loss", trivial):
        return f"RTD loss {history.mean('rtd_loss'):.3f}, that of the share of replaced tokens {trivial:.3f}"
    return None


def _detection_mark(history: History) -> float:
    return max(0.02, _detection_noise(history))


def _detection_noise(history: History) -> float:
    """SIGMAS standard deviations of the trivial loss, of which it is a share: log odds times that of the rate."""
    rate = history.mean("replace_rate")
    if not 0 < rate < 1:
        return math.inf
    spread = abs(math.log(rate / (1 - rate))) * math.sqrt(rate * (1 - rate) / sum(x.tokens for x in history.window()))
    return SIGMAS * spread / detection_entropy(rate)


def _auc_noise(history: History) -> float:
    tokens, rate = sum(line.tokens for line in history.window()), history.mean("replace_rate")
    return SIGMAS * chance_of_auc(rate * tokens, (1 - rate) * tokens)


def detection_inverted(history: History) -> str | None:
    if not (history.is_warm and history.has("rtd_auc")):
        return None
    auc = history.mean("rtd_auc")
    return f"AUC {auc:.3f}" if auc < 0.5 - max(0.05, _auc_noise(history)) else None


def other_labels(history: History) -> str | None:
    """RTD's loss is lower than what AUC counts allows: a share x of it goes with that share of the replaced tokens,
    found for sure, at most, and AUC is 1/2 + x / 2 then.
    """
    if not (history.is_warm and history.has("rtd_auc")):
        return None
    auc, gain = history.mean("rtd_auc"), history.gain("rtd")
    if gain < 2 * (auc + _auc_noise(history)) - 1 + _detection_mark(history):
        return None
    trivial = detection_entropy(history.mean("replace_rate"))
    return f"RTD loss {history.mean('rtd_loss'):.3f}, that of guessing {trivial:.3f}, but AUC {auc:.3f}"


def all_original(history: History) -> str | None:
    """Neither inverted nor worse than what says so, nor since the model diverged."""
    return _says_original(history, _moving(history))


def _says_original(history: History, terms: Sequence[str]) -> str | None:
    if "rtd" not in terms or not (history.is_half_done and history.has("rtd_auc")):
        return None
    auc, gain = history.mean("rtd_auc"), history.gain("rtd")
    if _auc_noise(history) > 0.1:
        return None  # so few tokens do not tell 1/2 from what is clearly above
    if auc > 0.5 + max(0.01, _auc_noise(history) / 2) and (gain > 0 or gain < -_detection_mark(history)):
        return None
    if detection_inverted(history) or other_labels(history):
        return None
    if gain < -_detection_mark(history) and history.mean("replace_accuracy") > 0.1:
        return None  # it says replaced to many, whichever they are, which is worse than frequencies
    if detection_collapsed(history) or loss_fell_back(history):
        return None
    return f"AUC {auc:.3f}, replaced tokens found {history.mean('replace_accuracy'):.1%}"


def detection_collapsed(history: History) -> str | None:
    """Main got worse though its task got no harder: the auxiliary is as good as it was, and draws from as much.

    Before the auxiliary knows more than frequencies its draws get harder while its loss stands.
    """
    if not (history.is_warm and history.has("rtd_auc", "aux_loss")):
        return None
    aux, now, hottest = history.mean("aux_loss"), history.mean("rtd_auc"), 1.01 * history.temperature(history.window())
    alike = [
        window
        for window in history.settled_windows
        if history.mean("aux_loss", window) <= aux + history.noise()
        and history.knows_words("aux", window)
        and history.temperature(window) <= hottest
    ]
    best = max((history.mean("rtd_auc", window) for window in alike), default=0.5)
    lost = best - 0.5 > 4 * _auc_noise(history) and now - 0.5 < (best - 0.5) / 4
    return f"AUC {now:.3f} after {best:.3f}, at no better an auxiliary" if lost else None


def loss_fell_back(history: History) -> str | None:
    """More than half of what a language model had learned is lost, or all of what detection had, and more."""
    if not history.is_warm:
        return None
    for term in history.language_terms:
        losses = history.settled_means(f"{term}_loss")
        best, now, trivial = min(losses, default=math.inf), history.mean(f"{term}_loss"), history.last.unigram
        if trivial - best > 2 * history.noise() and now > (best + trivial) / 2:
            return f"{term} loss {now:.3f} after {best:.3f}"
    if history.has("rtd_loss") and history.gain("rtd") < -_detection_mark(history):
        mark = _detection_mark(history)
        known = [history.mean("rtd_loss", one) for one in history.settled_windows if history.gain("rtd", one) > mark]
        return f"rtd loss {history.mean('rtd_loss'):.3f} after {min(known):.3f}" if known else None
    return None


def plateau(history: History) -> str | None:
    return None if loss_fell_back(history) else _on_frequencies(history, _moving(history))


def _on_frequencies(history: History, terms: Sequence[str]) -> str | None:
    """As many steps lie behind as before, and nothing but frequencies is known."""
    if not (history.is_half_done and _has_masks(history)):
        return None
    filler = next((term for term in ("aux", "mlm") if term in history.language_terms), None)
    if filler is None or filler not in terms or history.gain(filler) > 0.01:
        return None
    if history.gets_below(f"{filler}_loss", 0.99 * history.last.unigram):
        return None
    return f"{filler} loss {history.mean(f'{filler}_loss'):.3f}, that of word frequencies {history.last.unigram:.3f}"


def clm_learns_nothing(history: History) -> str | None:
    """The auxiliary reads less and knows more: main's correction has a tenth of what the auxiliary has learned."""
    return _corrects_nothing(history, _moving(history))


def _corrects_nothing(history: History, terms: Sequence[str]) -> str | None:
    if "clm" not in terms or not history.is_half_done or not {"aux", "clm"} <= set(history.language_terms):
        return None
    aux, clm = history.gain("aux"), history.gain("clm")
    is_sure = aux * history.last.unigram > 2 * history.noise()
    shown = f"CLM loss {history.mean('clm_loss'):.3f}, MLM {history.mean('aux_loss'):.3f}"
    if not is_sure or clm >= aux / 10 or history.gets_below("clm_loss", (1 - aux / 10) * history.last.unigram):
        return None
    return f"{shown}, word frequencies {history.last.unigram:.3f}"


def _has_masks(history: History) -> bool:
    return sum(line.masked for line in history.window()) >= LEAST_MASKS


def auxiliary_too_good(history: History) -> str | None:
    if not _has_masks(history):
        return None
    for name in ("sampled_accuracy", "aux_accuracy"):
        if history.has(name) and history.mean(name) > TOO_GOOD:
            of = "filled with the original" if name == "sampled_accuracy" else "whose original is its likeliest word"
            return f"{history.mean(name):.1%} of the masks {of}"
    return _nearly_certain(history, "aux")


def _nearly_certain(history: History, term: str) -> str | None:
    is_so = _has_masks(history) and term in history.language_terms and history.gain(term) > TOO_GOOD
    shown = f"{term} loss {history.mean(f'{term}_loss'):.3f}" if is_so else ""
    return f"{shown}, that of word frequencies {history.last.unigram:.3f}" if is_so else None


def main_too_good(history: History) -> str | None:
    """Draws of a model that knows words are in part as likely as the originals, and tell main nothing of them that the
    auxiliary does not know: what main knows more comes from its size, and losses fall as its 0.076th power (Kaplan et
    al. 2020), so that half of the auxiliary's is out of reach.
    """
    terms = history.language_terms
    if {"aux", "clm"} <= set(terms) and history.knows_words("aux"):
        aux, clm = history.mean("aux_loss"), history.mean("clm_loss")
        if clm < aux / 2 * history.times_as_large**-0.076 - history.noise():
            return f"CLM loss {clm:.3f}, MLM {aux:.3f}"
    if history.has("rtd_auc", "aux_loss") and history.gain("aux") > 0.1:
        auc = history.mean("rtd_auc")
        if auc > 0.998 and history.temperature(history.window()) <= 1:
            return f"AUC {auc:.4f}"
    return _nearly_certain(history, "mlm")


def always_the_likeliest(history: History) -> str | None:
    """A draw is the original less often than the likeliest word is, unless it is that word."""
    if not history.has("sampled_accuracy") or history.config.corruption.disallow_correct:
        return None
    sampled, likeliest = history.mean("sampled_accuracy"), history.mean("aux_accuracy")
    masked = sum(line.masked for line in history.window())
    # Equal to the last one of hundreds of hits: two ways of choosing would differ.
    # Where all are hits, draws have no other word to take.
    if sampled * masked < 100 or sampled == 1 or abs(sampled - likeliest) * masked >= 0.5:
        return None
    return f"both accuracies of the auxiliary {sampled:.3%}"
