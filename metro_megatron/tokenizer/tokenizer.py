"""The tokenizer a run uses, read from a folder: one of tools/train_tokenizer.py, or any other with the tokens needed.

Datasets, runs and exports have a folder of their own with the same files, in which everybody finds the same ids.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metro_megatron.errors import UserError
from metro_megatron.files import remove_partial, write_whole
from metro_megatron.vocabulary import SpecialIds

MODEL_FILE = "tokenizer.model"
"""SentencePiece's, of a tokenizer of tools/train_tokenizer.py."""
JSON_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (MODEL_FILE, JSON_FILE, CONFIG_FILE)

WORD_BOUNDARY = "\u2581"
"""SentencePiece's visible space."""


BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A token that stands for one byte of what no other has."""


class Tokenizer(ABC):
    """Text to ids and back. Text that spells a special token stays text: its id is in no text."""

    def __init__(self, path: Path, sha256: str, vocab_size: int, special_ids: SpecialIds):
        self.path = path
        """Its folder."""
        self.sha256 = sha256
        """Of the file that the ids come from."""
        self.vocab_size = vocab_size
        """Ids are below it."""
        self.special_ids = special_ids

    @staticmethod
    def from_folder(path: str | Path) -> Tokenizer:
        """Load a folder written by tools/train_tokenizer.py, or any with a tokenizer that transformers reads.

        A file in such a folder stands for it. Raises UserError if a file is missing or unreadable, or the tokenizer
        lacks a token.
        """
        # Late, as both are kinds of this class.
        from metro_megatron.tokenizer.pipeline import PipelineTokenizer
        from metro_megatron.tokenizer.trained import TrainedTokenizer

        folder = Path(path)
        if folder.is_file() and folder.name in TOKENIZER_FILES:
            folder = folder.parent
        return TrainedTokenizer.open(folder) or PipelineTokenizer.open(folder)

    @property
    @abstractmethod
    def files(self) -> Mapping[str, bytes]:
        """What a folder of this tokenizer holds, by name."""

    @property
    @abstractmethod
    def added_tokens(self) -> tuple[str, ...]:
        """Strings that are tokens of their own: a library may find them in text."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, without those that begin and end a sample."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; specials give nothing, except that of unknown words."""

    @abstractmethod
    def token(self, number: int) -> str:
        """The string of an id, as its vocabulary has it."""

    @abstractmethod
    def piece(self, number: int) -> bytes:
        """What an id adds to a text, in UTF-8: a token that begins a word has its space; a special one its string."""

    @abstractmethod
    def word_starts(self) -> NDArray[np.bool_] | None:
        """[V] whether an id begins a word inside a text; None where the tokens do not say it."""

    def encode_following(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that each follow another one and a space."""
        return self.encode_batch(texts)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without those that begin and end a sample; none for the empty string."""
        return self.encode_batch([text])[0]


def starts_of(tokens: Sequence[str], mark: str | tuple[str, ...]) -> NDArray[np.bool_]:
    """[V] whether tokens begin with a mark, or one of several."""
    return np.array([token.startswith(mark) for token in tokens])


def sentencepiece_bytes(piece: str) -> bytes:
    """What a piece of a SentencePiece model adds to a text, in UTF-8."""
    byte = BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(WORD_BOUNDARY, " ").encode()


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Put the files of a tokenizer folder into folder `target`; each appears there whole or not at all.

    Raises UserError as `Tokenizer.from_folder`.
    """
    target = Path(target)
    files = Tokenizer.from_folder(source).files
    target.mkdir(parents=True, exist_ok=True)
    remove_partial(target)
    for name, content in files.items():
        write_whole(target / name, content)


def unreadable(path: Path, error: Exception) -> UserError:
    """What to say of a tokenizer's file that a library cannot read."""
    return UserError(f"{path}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]}); give another copy")
