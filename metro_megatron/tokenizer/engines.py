"""Encoding engines: which library turns text into SentencePiece's ids, chosen and announced in one place.

gigatoken is several times faster and gives SentencePiece's ids, except that it reads the string of a special token
as that token, where SentencePiece reads text. Texts with such a string go to SentencePiece itself. An engine is
compared with SentencePiece on hostile text whenever it is created.
"""

import importlib.util
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from metro_megatron.errors import UserError
from metro_megatron.tokenizer.tokenizer import MODEL_FILE, WORD_BOUNDARY, Tokenizer
from metro_megatron.vocabulary import SPECIAL_TOKENS

GIGATOKEN, SENTENCEPIECE = ENGINES = ("gigatoken", "sentencepiece")
AUTO = "auto"

Encoded = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Ids of all texts one after another, and how many each has."""

_PROBES = (
    *("", " ", "  a  b ", "\t", "\n", "\r\n", "a\tb\nc", "\0", "\x7f\x85\u00a0\u200b\u200d\u2028\u3000\ufeff"),
    *(WORD_BOUNDARY, WORD_BOUNDARY * 3, f" {WORD_BOUNDARY}a {WORD_BOUNDARY}", f"a{WORD_BOUNDARY}b", "<0x41>", "<unk"),
    *("\ufffd\ufffe\ue000\U0010ffff", "e\u0301\u0130\ufb01", "\u6f22\u5b57 \u0627\u0644", "\U0001f468\u200d\U0001f469"),
    *("The quick brown fox's 1,000.50 http://x.y/?a=b", "x" * 3000, "-" * 3001, " " * 300, "ab " * 1000),
)


_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


class _Encoder(Protocol):
    def encode(self, texts: Sequence[str]) -> Encoded: ...


class Engine:
    """Encodes texts with exactly the ids of a tokenizer folder's SentencePiece model; in one thread."""

    def __init__(self, name: str, encoder: _Encoder):
        self.name = name
        """One of ENGINES."""
        self._encoder = encoder

    @classmethod
    def create(cls, tokenizer_folder: str | Path, name: str = AUTO) -> Self:
        """The engine `name`: one of ENGINES, or "auto" for gigatoken where it is installed and exact.

        Raises UserError if the tokenizer is unusable, or the named engine is unknown, missing or not exact.
        """
        if name not in (AUTO, *ENGINES):
            raise UserError(f"--engine {name}: must be {AUTO}, {' or '.join(ENGINES)}")
        tokenizer = Tokenizer.from_folder(tokenizer_folder)
        if name == SENTENCEPIECE:
            return cls(SENTENCEPIECE, _SentencePiece(tokenizer))
        problem = "is not installed" if importlib.util.find_spec(GIGATOKEN) is None else ""
        if not problem:
            fast = _Gigatoken(tokenizer)
            problem = _difference(fast, tokenizer)
            if not problem:
                return cls(GIGATOKEN, fast)
        if name == GIGATOKEN:
            raise UserError(
                f"--engine gigatoken: it {problem}; pip install gigatoken==0.10.0, or leave --engine {AUTO}"
            )
        print(f"engine: sentencepiece, several times slower, as gigatoken {problem}", file=sys.stderr, flush=True)
        return cls(SENTENCEPIECE, _SentencePiece(tokenizer))

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of the texts without `<s>` and `</s>`, flat, and their number per text; both int32."""
        return self._encoder.encode(texts)


class _SentencePiece:
    """Through `Tokenizer`, which remembers the ids of words."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Encoded:
        ids = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


class _Gigatoken:
    """gigatoken on the calling thread; SentencePiece for texts in which it would see a special token."""

    def __init__(self, tokenizer: Tokenizer):
        import gigatoken

        self._tokenizer = tokenizer
        self._backend: Any = gigatoken.Tokenizer.from_sentencepiece(tokenizer.path / MODEL_FILE).backend

    def encode(self, texts: Sequence[str]) -> Encoded:
        texts = list(texts)
        if _SPECIAL.search("\n".join(texts)):
            return self._encode_mixed(texts, [i for i, text in enumerate(texts) if _SPECIAL.search(text)])
        return self._encode_all(texts)

    def _encode_all(self, texts: list[str]) -> Encoded:
        layout = self._backend.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids.view(np.int32), np.diff(offsets).astype(np.int32)

    def _encode_mixed(self, texts: list[str], slow: list[int]) -> Encoded:
        """Texts number `slow` (ascending) by SentencePiece, the others by gigatoken."""
        slow_ids, slow_lengths = _SentencePiece(self._tokenizer).encode([texts[i] for i in slow])
        for i in slow:
            texts[i] = ""
        ids, lengths = self._encode_all(texts)
        begins = np.cumsum(lengths)[slow]  # where the empty texts are
        lengths[slow] = slow_lengths
        return np.insert(ids, np.repeat(begins, slow_lengths), slow_ids), lengths


def _difference(fast: _Encoder, tokenizer: Tokenizer) -> str:
    """How an encoder differs from SentencePiece on hostile text; "" where it does not."""
    texts = [*_PROBES, *SPECIAL_TOKENS, *(f"a {token}b {token}" for token in SPECIAL_TOKENS)]
    ids, lengths = fast.encode(texts)
    expected = tokenizer.encode_batch(texts)
    for text, these, those in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), expected, strict=True):
        if these.tolist() != those:
            return f"gives {these[:10].tolist()} and SentencePiece {those[:10]} for {text[:40]!r}"
    return ""
