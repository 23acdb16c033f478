"""Which documents repeat an evaluation text: word n-grams, compared by 64-bit hashes.

Words are runs of letters and digits in lower case; everything else separates. A document overlaps if it has 13
consecutive words of an evaluation text, or all words of one that has 8 to 12. Shorter texts would meet by chance
and are ignored. Two different n-grams have one hash with probability about 2**-64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from metro_megatron.data.documents import ChunkReader, ReadOptions, Reject
from metro_megatron.data.inputs import find_inputs, plan_chunks
from metro_megatron.errors import UserError
from metro_megatron.randomness import hash64

NGRAM_WORDS = 13
SHORTEST_TEXT = 8

_BASE = 0xD6E8FEB86659FD93
_INVERSE = pow(_BASE, -1, 1 << 64)
_FILTER_BITS = 20


@dataclass(frozen=True)
class EvaluationNgrams:
    """Hashes of the n-grams of evaluation texts; picklable."""

    hashes: dict[int, NDArray[np.uint64]]
    """Ascending, by number of words."""
    filters: dict[int, NDArray[np.bool_]]
    """Whether any hash begins with these bits: most look-ups end here."""
    texts: int
    """Evaluation texts that are looked for."""
    ignored: int
    """Evaluation texts that are too short."""

    @classmethod
    def from_files(cls, patterns: Sequence[str]) -> "EvaluationNgrams":
        """From JSON Lines (every string in an object is a text) or plain text (every document is one).

        Raises UserError if a file cannot be read or none holds a text that is long enough.
        """
        found: dict[int, list[NDArray[np.uint64]]] = {}
        texts = ignored = 0
        for text in _texts(patterns):
            words, _ = _words([text])
            if len(words) < SHORTEST_TEXT:
                ignored += 1
                continue
            texts += 1
            size = min(NGRAM_WORDS, len(words))
            found.setdefault(size, []).append(_ngram_hashes(words, size))
        if not texts:
            raise UserError(
                f"no evaluation text of at least {SHORTEST_TEXT} words in {', '.join(patterns)}; check --decontaminate"
            )
        hashes = {size: np.unique(np.concatenate(parts)) for size, parts in found.items()}
        return cls(hashes, {size: _filter(values) for size, values in hashes.items()}, texts, ignored)

    def overlapping(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """[n] whether each text repeats an evaluation text; many at once are faster than one by one."""
        words, words_before = _words(texts)
        is_hit = np.zeros(len(texts), np.bool_)
        for size, hashes in self.hashes.items():
            ngrams = _ngram_hashes(words, size)
            places = np.flatnonzero(self.filters[size][ngrams >> np.uint64(64 - _FILTER_BITS)])
            found = np.searchsorted(hashes, ngrams[places])
            places = places[hashes[np.minimum(found, len(hashes) - 1)] == ngrams[places]]
            first, last = (np.searchsorted(words_before, place, side="right") for place in (places, places + size - 1))
            is_hit[first[first == last] - 1] = True
        return is_hit


def _texts(patterns: Sequence[str]) -> Iterator[str]:
    for file in find_inputs(patterns):
        (chunk,) = plan_chunks([file], max(1, file.size))
        for record in ChunkReader(chunk, ReadOptions()):
            if isinstance(record.raw, Reject):
                raise UserError(f"{file.path}: record at byte {record.place:,} is too long for an evaluation text")
            try:
                if record.is_json:
                    yield from _strings(orjson.loads(record.raw))
                else:
                    yield record.raw if isinstance(record.raw, str) else record.raw.decode()
            except ValueError as error:
                raise UserError(f"{file.path}: record at byte {record.place:,} cannot be read ({error})") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _words(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """[w] a hash of every word of all texts, and [n] how many words there are before each text."""
    encoded = [text.lower().encode() for text in texts]
    characters = np.frombuffer(b"\n".join(encoded), np.uint8)
    is_word = np.concatenate([[False], _IS_WORD[characters], [False]])
    borders = np.flatnonzero(is_word[1:] != is_word[:-1])
    begins, ends = borders[::2], borders[1::2]
    hashes = _window_hashes(characters.astype(np.uint64) + np.uint64(1), begins, ends)
    starts = np.cumsum([0, *(len(text) + 1 for text in encoded[:-1])])
    return hashes, np.searchsorted(begins, starts)


def _ngram_hashes(words: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """[w - size + 1] a hash of every `size` words in a row."""
    begins = np.arange(max(0, len(words) - size + 1))
    return _window_hashes(words, begins, begins + size)


def _window_hashes(
    values: NDArray[np.uint64], begins: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Hashes of values[begin:end] for every window: polynomials in _BASE modulo 2**64, from prefix sums, mixed."""
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _powers(_BASE, len(values)), out=sums[1:])
    return hash64((sums[ends] - sums[begins]) * _powers(_INVERSE, len(values) + 1)[begins])


@lru_cache(maxsize=64)
def _powers_to(base: int, bits: int) -> NDArray[np.uint64]:
    powers = np.ones(1, np.uint64)
    for _ in range(bits):
        powers = np.concatenate([powers, powers * np.uint64(base)])
        base = base * base % (1 << 64)
    return powers


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """[count] base**i modulo 2**64."""
    return _powers_to(base, max(0, count - 1).bit_length())[:count]


def _filter(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    table = np.zeros(1 << _FILTER_BITS, np.bool_)
    table[hashes >> np.uint64(64 - _FILTER_BITS)] = True
    return table


_IS_WORD = np.array([chr(code).isalnum() if code < 128 else True for code in range(256)])
"""By UTF-8 byte; those of characters beyond ASCII count as letters."""
