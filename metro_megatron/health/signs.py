"""The signs in losses and what they count: each a pure function of the log lines so far, to what shows an illness now.

None: nothing does. Their marks come from something: what a model gets that knows frequencies only, the spread of a mean
over so many tokens, how long Adam remembers; none was fitted to a size or a corpus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from metro_megatron.health.history import SIGMAS, History
from metro_megatron.health.trivial import chance_of_auc, detection_entropy

TOO_GOOD = 0.9
"""Share of the masked words, or of the nats that frequencies leave open, that a model of text does not get to know."""
LEAST_MASKS = 100
"""Masks that what a model knows is judged by."""


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
