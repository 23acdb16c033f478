"""A few sentences, filled and corrected by the parts that an exported model has, as lines to look at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
import torch

from metro_megatron.data.samples import build_sample_index
from metro_megatron.evaluate.intrinsic import filling, guess, held_out_text, masked_samples, terms_of
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.modeling_metro import LANGUAGE_MODELS, MetroForPreTraining
from metro_megatron.tokenizer.tokenizer import WORD_BOUNDARY, Tokenizer
from metro_megatron.vocabulary import MASK_ID, NUM_SPECIALS

_SENTENCE = re.compile(r"[^.!?]+[.!?]")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Shown:
    """One sentence in its states."""

    original: str
    masked: str
    filled: str
    corrected: str | None
    """None where main neither detects nor corrects."""

    def __str__(self) -> str:
        return "\n".join(f"  {name:<10}{text}" for name, text in vars(self).items() if text is not None)


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
def show(model: MetroForPreTraining, folder: Path, sentences: Sequence[str], seed: int) -> Iterator[Shown]:
    """Mask each sentence by itself as in pretraining; `folder` is the exported one, for its tokenizer."""
    tokenizer = Tokenizer.from_folder(folder)
    pieces = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    heads = {term.name: term for term in terms_of(model.config)}
    corrector = next((heads[name] for name in LANGUAGE_MODELS if name in heads), None)
    model.eval()
    for sentence in sentences:
        text = held_out_text([[sentence]], tokenizer)
        index = build_sample_index([text], model.config.max_position_embeddings)
        batch = masked_samples(text, index, np.zeros(1, np.int64), seed)
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
        masked = [MASK_ID if hidden else one for one, hidden in zip(original, is_masked, strict=True)]
        unmarked = [False] * len(original)
        corrected = None
        if is_called:
            words = [mine if called else given for given, mine, called in zip(filled, own, is_called, strict=True)]
            corrected = _text(pieces, words, is_called, "{}")
        yield Shown(
            original=_text(pieces, original, unmarked, ""),
            masked=_text(pieces, masked, unmarked, ""),
            filled=_text(pieces, filled, is_masked, "[]"),
            corrected=corrected,
        )


def _sentences(document: Sequence[str], num_words: range) -> Iterator[str]:
    found = (match.group().strip() for unit in document for match in _SENTENCE.finditer(unit))
    return (sentence for sentence in found if len(sentence.split()) in num_words)


def _text(tokenizer: tokenizers.Tokenizer, ids: Sequence[int], is_marked: Sequence[bool], brackets: str) -> str:
    """Text of ids without specials (but `<mask>`), marked ones in brackets; a space before a piece stays outside."""
    text = b""
    for i, marked in zip(ids, is_marked, strict=True):
        if i < NUM_SPECIALS and i != MASK_ID and not marked:
            continue
        piece = tokenizer.id_to_token(i) or ""
        byte = _BYTE.fullmatch(piece)
        content = bytes([int(byte.group(1), 16)]) if byte else piece.replace(WORD_BOUNDARY, " ").encode()
        if i == MASK_ID:
            content = b" " + content
        if marked:
            space = b" " if content.startswith(b" ") else b""
            content = space + brackets[0].encode() + content.removeprefix(b" ") + brackets[1].encode()
        text += content
    return text.decode(errors="replace").strip()
