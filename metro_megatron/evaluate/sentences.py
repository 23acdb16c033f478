"""A few sentences, filled and corrected by the parts that an exported model has, as lines to look at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from metro_megatron.data.samples import build_sample_index
from metro_megatron.evaluate.intrinsic import (
    MaskedSamples,
    filling,
    guess,
    held_out_text,
    masked_samples,
    terms_of,
    unigram_probabilities,
)
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.heads_metro import LANGUAGE_MODELS
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.randomness import Purpose, hash64, uniform
from metro_megatron.tokenizer.tokenizer import Tokenizer

_SENTENCE = re.compile(r"[^.!?]+[.!?]")
WORDS_PER_MASK = 6
"""Of a shown sentence one word in so many is masked, about as many tokens as in pretraining."""
SHOWN_GUESSES = 3


@dataclass(frozen=True)
class Candidate:
    """What may stand at a masked token, and how likely that is."""

    token: str
    probability: float

    def __str__(self) -> str:
        return f"{self.token} {self.probability:.1%}"


@dataclass(frozen=True)
class Masked:
    """One masked token, and what is expected there."""

    token: str
    """The one that stood there."""
    guesses: list[Candidate]
    """The model's likeliest tokens, the best one first."""
    probability: float
    """Of the token that stood there, by the model."""
    frequent: Candidate
    """The likeliest by word frequencies alone: the same everywhere."""
    frequency: float
    """Of the token that stood there, by word frequencies alone."""

    def __str__(self) -> str:
        guesses = ", ".join(map(str, self.guesses))
        return (
            f"{self.token!r}: {guesses} (it has {self.probability:.1%}; by frequencies alone {self.frequency:.1%}, "
            f"and {self.frequent} leads everywhere)"
        )


@dataclass(frozen=True)
class Shown:
    """One sentence in its states."""

    original: str
    masked: str
    filled: str
    corrected: str | None
    """None where main neither detects nor corrects."""
    masks: list[Masked]
    """In order; none where words are filled at random."""

    def __str__(self) -> str:
        states = {name: getattr(self, name) for name in ("original", "masked", "filled", "corrected")}
        lines = [f"  {name:<10}{text}" for name, text in states.items() if text is not None]
        return "\n".join([*lines, *(f"  {'expected':<10}{mask}" for mask in self.masks)])


def legend(config: MetroConfig) -> str:
    """What the brackets of the shown sentences mean."""
    fillers = {"auxiliary": "by the auxiliary model", "uniform": "at random", "none": "by the main model"}
    filled = f"[...] filled {fillers[filling(config)]}"
    if "rtd" in config.objectives:
        own = ", with its own word instead" if "clm" in config.objectives else ""
        return f"{filled}; {{...}} called replaced by the main model{own}"
    return f"{filled}; {{...}} another word by the main model" if "clm" in config.objectives else filled


def choose_sentences(documents: Iterable[Sequence[str]], wanted: int, num_words: range = range(9, 19)) -> list[str]:
    """The first sentence with so many words of each of the first documents that have one."""
    first_of_each = (next(_sentences(document, num_words), None) for document in documents)
    return list(islice(filter(None, first_of_each), wanted))


@torch.no_grad()
def show(
    model: MetroForPreTraining, folder: Path, sentences: Sequence[str], token_counts: NDArray[np.int64], seed: int
) -> Iterator[Shown]:
    """Mask whole words of each sentence; `folder` is the exported one, for its tokenizer.

    token_counts [V] are those of the training text: what is expected without reading the sentence.
    """
    tokenizer = Tokenizer.from_folder(folder)
    heads = {term.name: term for term in terms_of(model.config)}
    corrector = next((heads[name] for name in LANGUAGE_MODELS if name in heads), None)
    frequencies = torch.from_numpy(unigram_probabilities(token_counts))
    model.eval()
    for sentence in sentences:
        text = held_out_text([[sentence]], tokenizer)
        index = build_sample_index([text], model.config.max_position_embeddings)
        batch = masked_samples(text, index, np.zeros(1, np.int64), seed, tokenizer.special_ids)
        batch = whole_words(batch, tokenizer, seed)
        guesses = guess(model, batch)
        original, filled = batch.ids[0].tolist(), guesses.noised[0].tolist()
        is_masked, own, is_called = batch.is_masked[0].tolist(), filled, None
        if corrector:
            everywhere = torch.ones_like(guesses.noised, dtype=torch.bool, device=model.device)
            hidden = model.metro(guesses.noised.to(model.device)).last_hidden_state
            own = corrector.exported_logits(model, hidden, everywhere).argmax(-1).tolist()
        if "rtd" in heads:
            is_called = (guesses.logits["rtd"][0] < 0).tolist()
        elif "clm" in heads:
            is_called = [mine != given for mine, given in zip(own, filled, strict=True)]
        elif "mlm" in heads:
            filled = [mine if masked else given for given, mine, masked in zip(filled, own, is_masked, strict=True)]
        mask = tokenizer.special_ids.mask
        masked = [mask if hidden else one for one, hidden in zip(original, is_masked, strict=True)]
        unmarked = [False] * len(original)
        corrected = None
        if is_called:
            words = [mine if called else given for given, mine, called in zip(filled, own, is_called, strict=True)]
            corrected = _text(tokenizer, words, is_called, "{}")
        yield Shown(
            original=_text(tokenizer, original, unmarked, ""),
            masked=_text(tokenizer, masked, unmarked, ""),
            filled=_text(tokenizer, filled, is_masked, "[]"),
            corrected=corrected,
            masks=_masks(tokenizer, batch, guesses.logits, frequencies),
        )


def whole_words(batch: MaskedSamples, tokenizer: Tokenizer, seed: int) -> MaskedSamples:
    """The one sample of the batch with whole words masked, one in WORDS_PER_MASK.

    Those of a single token come first: a guess at part of a word says little to a reader.
    """
    words: list[list[int]] = []
    starts = tokenizer.word_starts()
    for position, token in enumerate(batch.ids[0].tolist()):
        if token in tokenizer.special_ids.all:
            continue
        if not words or starts is None or starts[token]:
            words.append([])
        words[-1].append(position)
    wanted = max(1, len(words) // WORDS_PER_MASK)
    order = sorted(words, key=lambda word: (len(word) > 1, hash64(seed, Purpose.MASK, word[0])))
    positions = sorted(position for word in order[:wanted] for position in word)
    is_masked = torch.zeros_like(batch.is_masked)
    is_masked[0, positions] = True
    draws = [uniform(seed, Purpose.SAMPLE, np.array(positions), draw) for draw in range(batch.noise.size(1))]
    return replace(batch, is_masked=is_masked, noise=torch.from_numpy(np.stack(draws, axis=1)))


def _masks(
    tokenizer: Tokenizer, batch: MaskedSamples, logits: dict[str, torch.Tensor], frequencies: torch.Tensor
) -> list[Masked]:
    """What the model that fills masks expects at each."""
    name = next((name for name in ("aux", "mlm") if name in logits), None)
    if name is None:
        return []

    def token(id: int) -> str:
        return _text(tokenizer, [id], [False], "")

    commonest = int(frequencies.argmax())
    frequent = Candidate(token(commonest), float(frequencies[commonest]))
    found = []
    for own, row in zip(batch.ids[batch.is_masked].tolist(), logits[name].softmax(-1), strict=True):
        best = row.topk(SHOWN_GUESSES)
        guesses = [Candidate(token(i), p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        found.append(Masked(token(own), guesses, float(row[own]), frequent, float(frequencies[own])))
    return found


def _sentences(document: Sequence[str], num_words: range) -> Iterator[str]:
    found = (match.group().strip() for unit in document for match in _SENTENCE.finditer(unit))
    return (sentence for sentence in found if len(sentence.split()) in num_words)


def _text(tokenizer: Tokenizer, ids: Sequence[int], is_marked: Sequence[bool], brackets: str) -> str:
    """Text of ids without specials (but the mask), marked ones in brackets; a space before a piece stays outside."""
    special_ids = tokenizer.special_ids
    text = b""
    for i, marked in zip(ids, is_marked, strict=True):
        if i in special_ids.all and i != special_ids.mask and not marked:
            continue
        content = tokenizer.piece(i)
        if i == special_ids.mask:
            content = b" " + tokenizer.token(i).encode()
        if marked:
            space = b" " if content.startswith(b" ") else b""
            content = space + brackets[0].encode() + content.removeprefix(b" ") + brackets[1].encode()
        text += content
    return text.decode(errors="replace").strip()
