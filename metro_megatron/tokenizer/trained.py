"""A tokenizer of tools/train_tokenizer.py: SentencePiece BPE with byte fallback.

A folder holds `tokenizer.model` (SentencePiece), the equal `tokenizer.json` and `tokenizer_config.json` (for
`transformers.AutoTokenizer`). Ids here come from the `.model`, so they are SentencePiece's by construction. training.py
writes folders and shows the `.json` equal before it does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray

from metro_megatron.errors import UserError
from metro_megatron.tokenizer.tokenizer import (
    JSON_FILE,
    MODEL_FILE,
    TOKENIZER_FILES,
    WORD_BOUNDARY,
    Tokenizer,
    sentencepiece_bytes,
    starts_of,
)
from metro_megatron.vocabulary import NUM_SPECIALS, SPECIAL_TOKENS, TRAINED_IDS

_MAX_CACHED_WORDS = 300_000
_MAX_CACHED_CHARACTERS = 48


class TrainedTokenizer(Tokenizer):
    """Exact SentencePiece ids, words remembered: the same word is segmented once.

    Remembering words is exact because no piece crosses a space (checked on loading): SentencePiece then
    segments every space-delimited word by itself.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, path: Path, sha256: str):
        super().__init__(path, sha256, processor.get_piece_size(), TRAINED_IDS)
        self._processor = processor
        self._boundary_id: int = processor.piece_to_id(WORD_BOUNDARY)
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def open(cls, folder: Path) -> TrainedTokenizer | None:
        """None for a folder of another tokenizer.

        Raises UserError if a file is missing, or the model is unreadable, or neither one of ours nor that of the
        tokenizer.json beside it.
        """
        path = folder / MODEL_FILE
        if not path.is_file():
            return None
        processor = _processor(path)
        problems = check_model(processor)
        beside = folder / JSON_FILE
        is_same = not beside.is_file() or _has_tokens_of(processor, beside)
        if problems and is_same:
            return None
        if problems:
            raise UserError([f"{path}: {problem}" for problem in problems])
        if not is_same:
            raise UserError(
                f"{beside} is damaged, or of another tokenizer than {MODEL_FILE} beside it; "
                "remove the one that is not meant"
            )
        missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"tokenizer folder {folder} lacks {', '.join(missing)}; write one with tools/train_tokenizer.py"
            )
        return cls(processor, folder, hashlib.sha256(path.read_bytes()).hexdigest())

    @property
    def files(self) -> Mapping[str, bytes]:
        return {name: (self.path / name).read_bytes() for name in TOKENIZER_FILES}

    @property
    def added_tokens(self) -> tuple[str, ...]:
        return SPECIAL_TOKENS

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        cache = self._cache
        batch = []
        for text in texts:
            ids: list[int] = []
            for word in text.split(" ") if text else ():
                found = cache.get(word)
                ids += self._encode_word(word) if found is None else found
            batch.append(ids)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(map(int, ids)))

    def token(self, number: int) -> str:
        return self._processor.id_to_piece(number)

    def piece(self, number: int) -> bytes:
        return sentencepiece_bytes(self.token(number))

    def word_starts(self) -> NDArray[np.bool_]:
        return starts_of([self.token(number) for number in range(self.vocab_size)], WORD_BOUNDARY)

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = self._processor.encode(word) if word else [self._boundary_id]
        if len(self._cache) < _MAX_CACHED_WORDS and len(word) <= _MAX_CACHED_CHARACTERS:
            self._cache[word] = ids
        return ids


def _processor(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not a readable SentencePiece model ({error}); give another copy") from error


def _has_tokens_of(processor: sentencepiece.SentencePieceProcessor, path: Path) -> bool:
    """Whether a model's tokens are those of a tokenizer.json, which may have more, and ours spells with spaces."""
    try:
        beside = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # tokenizers raises plain ones
        return False
    vocabulary = {number: token for token, number in beside.get_vocab(with_added_tokens=True).items()}
    pieces = ((number, processor.id_to_piece(number)) for number in range(processor.get_piece_size()))
    return all(vocabulary.get(number) in (piece, piece.replace(WORD_BOUNDARY, " ")) for number, piece in pieces)


def check_model(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    """What keeps a SentencePiece model from being one of these; nothing for those of our own tool."""
    size = processor.get_piece_size()
    pieces = [processor.id_to_piece(i) for i in range(size)]
    problems = []
    if tuple(pieces[:NUM_SPECIALS]) != SPECIAL_TOKENS:
        problems.append(f"ids 0 to 4 are {pieces[:NUM_SPECIALS]}, must be {list(SPECIAL_TOKENS)}")
    if sum(processor.is_byte(i) for i in range(size)) != 256:
        problems.append("has no byte fallback (256 byte pieces); train with --byte_fallback")
    if WORD_BOUNDARY not in pieces:
        problems.append("has no piece for a single space")
    crossing = [piece for piece in pieces if WORD_BOUNDARY in piece[1:]]
    if crossing:
        problems.append(f"pieces such as {crossing[0]!r} cross a space; train with split_by_whitespace")
    as_it_is = "\u00a0 \t ab\u200d\ufb01 "
    if not problems and processor.decode(processor.encode(as_it_is)) != as_it_is:
        problems.append("normalizes its input; train with identity normalization and remove_extra_whitespaces=false")
    return problems
