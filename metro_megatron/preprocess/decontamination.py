"""Which documents repeat an evaluation text: word n-grams, compared by 64-bit hashes.

Words are runs of letters and digits in lower case; everything else separates. A document overlaps if it has 13
consecutive words of an evaluation text, or all words of one that has 8 to 12. Shorter texts would meet by chance
and are ignored. Two different n-grams have one hash with probability about 2**-64. F evaluation files.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from metro_megatron.errors import UserError
from metro_megatron.randomness import hash64
from metro_megatron.text.documents import ChunkReader, ReadOptions
from metro_megatron.text.inputs import InputFile, find_inputs, plan_chunks
from metro_megatron.text.records import Reject

NGRAM_WORDS, SHORTEST_TEXT = 13, 8
"""GPT-3's largest and smallest n-gram (arXiv 2005.14165, appendix C)."""

_BASE = 0xD6E8FEB86659FD93
"""Odd, so that it has an inverse modulo 2**64; else any number without a pattern in its bits."""
_INVERSE = pow(_BASE, -1, 1 << 64)
_BLOCK = 1 << 16
"""Bytes or words hashed at once: the arrays stay in a core's cache, and small."""


@dataclass(frozen=True)
class _Ngrams:
    """Hashes of the n-grams of one number of words [h], and the files that have them."""

    hashes: NDArray[np.uint64]
    """Ascending; one that several files have is there for each."""
    files: NDArray[np.int32]
    is_used: NDArray[np.bool_]
    """Whether any hash begins with these bits: most look-ups end here."""

    @classmethod
    def of(cls, hashes: NDArray[np.uint64], files: NDArray[np.int32]) -> "_Ngrams":
        order = np.lexsort((files, hashes))
        hashes, files = hashes[order], files[order]
        is_new = np.ones(len(hashes), np.bool_)
        is_new[1:] = (hashes[1:] != hashes[:-1]) | (files[1:] != files[:-1])
        hashes, files = hashes[is_new], files[is_new]
        # 16 to 32 entries for every hash, so that 3 to 6% of unknown n-grams ask for a search; at most 64 MB.
        bits = min(26, max(16, 4 + len(hashes).bit_length()))
        is_used = np.zeros(1 << bits, np.bool_)
        is_used[hashes >> np.uint64(64 - bits)] = True
        return cls(hashes, files, is_used)

    def find(self, ngrams: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Indices into `ngrams` of those that are known, with a file that has each; an index for every such file."""
        shift = np.uint64(65 - len(self.is_used).bit_length())
        found = np.flatnonzero(self.is_used[ngrams >> shift])
        first = np.searchsorted(self.hashes, ngrams[found])
        is_known = self.hashes[np.minimum(first, len(self.hashes) - 1)] == ngrams[found]
        found, first = found[is_known], first[is_known]
        counts = np.searchsorted(self.hashes, ngrams[found], side="right") - first
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(found, counts), self.files[np.repeat(first, counts) + steps]


@dataclass(frozen=True)
class EvaluationNgrams:
    """Hashes of the n-grams of evaluation texts; picklable."""

    num_files: int
    """F."""
    texts: int
    """Evaluation texts that are looked for."""
    ignored: int
    """Evaluation texts that are too short."""
    by_size: dict[int, _Ngrams]
    """By number of words."""

    @classmethod
    def from_files(cls, patterns: Sequence[str]) -> "EvaluationNgrams":
        """From JSON Lines (every string in an object is a text) or plain text (every document is one).

        Files are numbered as find_inputs orders them. Raises UserError if one cannot be read or none holds a text that
        is long enough.
        """
        files = find_inputs(patterns)
        texts = ((number, text) for number, file in enumerate(files) for text in _texts(file))
        found = cls.from_texts(texts, len(files))
        if not found.texts:
            raise UserError(
                f"no evaluation text of at least {SHORTEST_TEXT} words in {', '.join(patterns)}; check --decontaminate"
            )
        return found

    @classmethod
    def from_texts(cls, texts: Iterable[tuple[int, str]], num_files: int) -> "EvaluationNgrams":
        """From texts with the number, below F, of the file or whatever else they are counted for."""
        found: dict[int, list[NDArray[np.uint64]]] = {}
        numbers: dict[int, list[NDArray[np.int32]]] = {}
        used = ignored = 0
        for number, text in texts:
            words, _ = _words([text])
            if len(words) < SHORTEST_TEXT:
                ignored += 1
                continue
            used += 1
            size = min(NGRAM_WORDS, len(words))
            found.setdefault(size, []).append(_ngram_hashes(words, size))
            numbers.setdefault(size, []).append(np.full(len(words) - size + 1, number, np.int32))
        by_size = {size: _Ngrams.of(np.concatenate(found[size]), np.concatenate(numbers[size])) for size in found}
        return cls(num_files, used, ignored, by_size)

    def hits(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """[n, F] whether each text repeats one of each evaluation file; a megabyte of texts at once is fast."""
        is_hit = np.zeros((len(texts), self.num_files), np.bool_)
        for text, file in self._repetitions(texts):
            is_hit[text, file] = True
        return is_hit

    def repeated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """[F] whether any of the texts repeats one of each evaluation file, for many files."""
        is_repeated = np.zeros(self.num_files, np.bool_)
        for _, file in self._repetitions(texts):
            is_repeated[file] = True
        return is_repeated

    def _repetitions(self, texts: Sequence[str]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        """Numbers of texts, and for each the number of a file that it repeats; for one size of n-grams at a time."""
        words, words_before = _words(texts)
        for size, known in self.by_size.items():
            begins, files = known.find(_ngram_hashes(words, size))
            first, last = (np.searchsorted(words_before, word, side="right") for word in (begins, begins + size - 1))
            is_inside = first == last
            yield first[is_inside] - 1, files[is_inside]


def _texts(file: InputFile) -> Iterator[str]:
    (chunk,) = plan_chunks([file], max(1, file.size))
    for record in ChunkReader(chunk, ReadOptions()):
        if isinstance(record.raw, Reject):
            raise UserError(f"{file.path}: record at byte {record.position:,} is too long for an evaluation text")
        try:
            if record.is_json:
                yield from _strings(orjson.loads(record.raw))
            else:
                yield record.raw if isinstance(record.raw, str) else record.raw.decode()
        except ValueError as error:
            raise UserError(f"{file.path}: record at byte {record.position:,} cannot be read ({error})") from error


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
    hashes = _window_hashes(characters, begins, ends)
    starts = np.cumsum([0, *(len(text) + 1 for text in encoded[:-1])])
    return hashes, np.searchsorted(begins, starts)


def _ngram_hashes(words: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """[w - size + 1] a hash of every `size` words in a row."""
    begins = np.arange(max(0, len(words) - size + 1))
    return _window_hashes(words, begins, begins + size)


def _window_hashes(
    values: NDArray[np.unsignedinteger], begins: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Hashes of values[begin:end] for every window, begins ascending: mixed polynomials in _BASE modulo 2**64.

    Prefix sums of value x power give all windows that begin in one block.
    """
    hashes = np.empty(len(begins), np.uint64)
    borders = np.flatnonzero(np.diff(begins // _BLOCK, prepend=-1, append=-1))
    for first, last in pairwise(borders.tolist()):
        start = begins[first]
        # + 1: a zero at the end of a window would add nothing to its polynomial.
        block = values[start : ends[last - 1]].astype(np.uint64) + np.uint64(1)
        sums = np.zeros(len(block) + 1, np.uint64)
        np.cumsum(block * _powers(_BASE, len(block)), out=sums[1:])
        begin, end = begins[first:last] - start, ends[first:last] - start
        hashes[first:last] = (sums[end] - sums[begin]) * _powers(_INVERSE, int(begin[-1]) + 1)[begin]
    return hash64(hashes)


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


_IS_WORD = np.array([chr(code).isalnum() if code < 128 else True for code in range(256)])
"""By UTF-8 byte; those of characters beyond ASCII count as letters."""
