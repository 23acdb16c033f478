"""Encoding engines: which library turns text into a tokenizer's ids, chosen and announced in one place.

SentencePiece's ids are those of a tokenizer of tools/train_tokenizer.py, and those of `tokenizers` any other's.
gigatoken is several times faster and gives the same for BPE of either kind, except that it reads the string of a
special token as that token, where others read text. Texts with such a string go to the tokenizer's own library. An
engine is compared with that on hostile text whenever it is created.
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
from metro_megatron.tokenizer.tokenizer import JSON_FILE, MODEL_FILE, WORD_BOUNDARY, Tokenizer
from metro_megatron.tokenizer.trained import TrainedTokenizer

GIGATOKEN, SENTENCEPIECE, TOKENIZERS = ENGINES = ("gigatoken", "sentencepiece", "tokenizers")
AUTO = "auto"

Encoded = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Ids of all texts one after another, and how many each has."""

_PROBES = (
    *("", " ", "  a  b ", "\t", "\n", "\r\n", "a\tb\nc", "\0", "\x7f\x85\u00a0\u200b\u200d\u2028\u3000\ufeff"),
    *(WORD_BOUNDARY, WORD_BOUNDARY * 3, f" {WORD_BOUNDARY}a {WORD_BOUNDARY}", f"a{WORD_BOUNDARY}b", "<0x41>", "<unk"),
    *("\ufffd\ufffe\ue000\U0010ffff", "e\u0301\u0130\ufb01", "\u6f22\u5b57 \u0627\u0644", "\U0001f468\u200d\U0001f469"),
    *("The quick brown fox's 1,000.50 http://x.y/?a=b", "x" * 3000, "-" * 3001, " " * 300, "ab " * 1000),
)


class _Encoder(Protocol):
    def encode(self, texts: Sequence[str]) -> Encoded: ...


class Engine:
    """Encodes texts with exactly the ids of a tokenizer folder; in one thread."""

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
        own = SENTENCEPIECE if isinstance(tokenizer, TrainedTokenizer) else TOKENIZERS
        if name == own:
            return cls(own, _Own(tokenizer))
        if name not in (AUTO, GIGATOKEN):
            raise UserError(f"--engine {name}: {tokenizer.path} is read by {own}; give --engine {own}, or {AUTO}")
        problem = "is not installed" if importlib.util.find_spec(GIGATOKEN) is None else ""
        if not problem:
            try:
                fast = _Gigatoken(tokenizer)
            except Exception as error:  # of several kinds, as its parts are written in Rust
                problem = f"does not read it ({str(error).strip().splitlines()[0][:120]})"
            else:
                problem = _difference(fast, tokenizer, own)
            if not problem:
                return cls(GIGATOKEN, fast)
        if name == GIGATOKEN:
            raise UserError(
                f"--engine gigatoken: it {problem}; pip install gigatoken==0.10.0, or leave --engine {AUTO}"
            )
        print(f"engine: {own}, several times slower, as gigatoken {problem}", file=sys.stderr, flush=True)
        return cls(own, _Own(tokenizer))

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of the texts without those that begin and end a sample, flat, and their number per text; both int32."""
        return self._encoder.encode(texts)


class _Own:
    """Through `Tokenizer`: SentencePiece, with words remembered, or `tokenizers`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Encoded:
        ids = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


class _Gigatoken:
    """gigatoken on the calling thread; the tokenizer's own library for texts with an added token."""

    def __init__(self, tokenizer: Tokenizer):
        import gigatoken

        self._tokenizer = tokenizer
        self._added = re.compile("|".join(map(re.escape, tokenizer.added_tokens)))
        is_trained = isinstance(tokenizer, TrainedTokenizer)
        read: Any = gigatoken.Tokenizer.from_sentencepiece if is_trained else gigatoken.Tokenizer.from_json
        self._backend: Any = read(tokenizer.files[MODEL_FILE if is_trained else JSON_FILE]).backend

    def encode(self, texts: Sequence[str]) -> Encoded:
        texts = list(texts)
        if self._added.search("\n".join(texts)):
            return self._encode_mixed(texts, [i for i, text in enumerate(texts) if self._added.search(text)])
        return self._encode_all(texts)

    def _encode_all(self, texts: list[str]) -> Encoded:
        layout = self._backend.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids.view(np.int32), np.diff(offsets).astype(np.int32)

    def _encode_mixed(self, texts: list[str], slow: list[int]) -> Encoded:
        """Texts number `slow` (ascending) by the tokenizer's own library, the others by gigatoken."""
        slow_ids, slow_lengths = _Own(self._tokenizer).encode([texts[i] for i in slow])
        for i in slow:
            texts[i] = ""
        ids, lengths = self._encode_all(texts)
        begins = np.cumsum(lengths)[slow]  # where the empty texts are
        lengths[slow] = slow_lengths
        return np.insert(ids, np.repeat(begins, slow_lengths), slow_ids), lengths


def _difference(fast: _Encoder, tokenizer: Tokenizer, own: str) -> str:
    """How an encoder differs from a tokenizer's own library on hostile text; "" where it does not."""
    added = tokenizer.added_tokens
    texts = [*_PROBES, *added, *(f"a {token}b {token}" for token in added)]
    ids, lengths = fast.encode(texts)
    expected = tokenizer.encode_batch(texts)
    for text, these, those in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), expected, strict=True):
        if these.tolist() != those:
            return f"gives {these[:10].tolist()} and {own} {those[:10]} for {text[:40]!r}"
    return ""
