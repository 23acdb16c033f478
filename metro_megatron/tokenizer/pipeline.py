"""A tokenizer of others: any pipeline of `tokenizers`, such as BERT's WordPiece, RoBERTa's BPE and DeBERTa's unigrams.

It is read from `tokenizer.json`, from the files of a class of transformers, or from a SentencePiece model alone, and
kept as `tokenizer.json` and `tokenizer_config.json`, which make a tokenizer of the same ids whatever class it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, processors

from metro_megatron.errors import UserError
from metro_megatron.tokenizer.roles import id_of, special_ids_of, stored_settings, tokens_of_roles
from metro_megatron.tokenizer.tokenizer import (
    CONFIG_FILE,
    JSON_FILE,
    WORD_BOUNDARY,
    Tokenizer,
    sentencepiece_bytes,
    starts_of,
    unreadable,
)
from metro_megatron.tokenizer.tokenizer_json import tokenizer_config

_BYTE_LEVEL_SPACES = ("\u0120", "\u010a", "\u0109", "\u010d")
"""How byte-level BPE writes a space, a line end, a tab and a carriage return."""


class PipelineTokenizer(Tokenizer):
    """Exactly the ids of `tokenizers`, except in text that spells a special token, which stays text.

    tokens are those of ROLES. Raises UserError for a token that is missing.
    """

    def __init__(self, pipeline: tokenizers.Tokenizer, content: bytes, settings: Mapping[str, Any], folder: Path):
        self.tokens, self.unknown = tokens_of_roles(pipeline, settings, folder)
        special_ids = special_ids_of(pipeline, self.tokens, self.unknown)
        self._content = _finished(pipeline, content, self.tokens)
        self._pipeline = pipeline
        size = max(pipeline.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(folder, hashlib.sha256(self._content).hexdigest(), size, special_ids)
        self._in_no_text = set(special_ids.all)
        if self.unknown is not None:
            self._in_no_text.discard(id_of(pipeline, self.unknown))
        pipeline.encode_special_tokens = True

    @classmethod
    def open(cls, folder: Path) -> PipelineTokenizer:
        """Raises UserError for a folder without a tokenizer, or one that lacks a token."""
        path = folder / JSON_FILE
        if path.is_file():
            try:
                content = path.read_bytes()
                pipeline = tokenizers.Tokenizer.from_buffer(content)
            except Exception as error:  # tokenizers raises plain ones
                raise unreadable(path, error) from error
            return cls(pipeline, content, stored_settings(folder), folder)
        if not folder.is_dir() or not any(folder.iterdir()):
            raise UserError(
                f"tokenizer folder {folder} lacks {JSON_FILE}; write one with tools/train_tokenizer.py, or give the "
                "folder of another tokenizer"
            )
        pipeline, settings = _converted(folder)
        return cls(pipeline, b"", settings, folder)

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        config = tokenizer_config() | {
            "bos_token": self.tokens["bos"],
            "cls_token": self.tokens["bos"],
            "eos_token": self.tokens["eos"],
            "sep_token": self.tokens["eos"],
            "pad_token": self.tokens["pad"],
            "unk_token": self.unknown,
            "mask_token": self._mask(),
        }
        text = json.dumps({name: value for name, value in config.items() if value is not None}, indent=2) + "\n"
        return {JSON_FILE: self._content, CONFIG_FILE: text.encode()}

    @property
    def added_tokens(self) -> tuple[str, ...]:
        added = (token.content for token in self._pipeline.get_added_tokens_decoder().values())
        return tuple(dict.fromkeys([*self.tokens.values(), *added]))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._pipeline.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._as_text(encoding.ids) for encoding in found]

    def encode_following(self, texts: Sequence[str]) -> list[list[int]]:
        """Of byte-level BPE the space is part of the first token; others put one before every text themselves."""
        return self.encode_batch([f" {text}" for text in texts] if self._marks == "bytes" else texts)

    def decode(self, ids: Sequence[int]) -> str:
        kept = [one for one in map(int, ids) if one not in self._in_no_text]
        text: str = self._pipeline.decode(kept, skip_special_tokens=False)
        return text

    def token(self, number: int) -> str:
        return self._pipeline.id_to_token(number) or f"<id {number}>"

    def piece(self, number: int) -> bytes:
        token, marks = self.token(number), self._marks
        if marks == "bytes":
            return bytes(self._bytes[one] for one in token if one in self._bytes)
        if marks == "spaces":
            return sentencepiece_bytes(token)
        if marks == "words" or not token.startswith(marks):
            return f" {token}".encode()
        return token.removeprefix(marks).encode()

    def word_starts(self) -> NDArray[np.bool_] | None:
        tokens, marks = [self.token(number) for number in range(self.vocab_size)], self._marks
        if not marks:
            return None
        if marks == "words":
            return np.ones(len(tokens), dtype=np.bool_)
        if marks in ("bytes", "spaces"):
            starts = starts_of(tokens, _BYTE_LEVEL_SPACES if marks == "bytes" else WORD_BOUNDARY)
        else:
            starts = ~starts_of(tokens, marks)
        starts[list(self.special_ids.all)] = True
        return starts

    @cached_property
    def _marks(self) -> str:
        """How tokens say where words begin.

        "spaces" and "bytes": by SentencePiece's space, or that of byte-level BPE, in front; "words": every one does;
        else what those that do not begin one have in front, as WordPiece; empty where nothing says it.
        """
        stored = json.loads(self._content)
        kind = stored["model"]["type"]
        parts = json.dumps([stored[name] for name in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
        if kind == "WordPiece":
            return str(stored["model"]["continuing_subword_prefix"])
        if kind == "WordLevel":
            return "words"
        if '"ByteLevel"' in parts:
            return "bytes"
        return "spaces" if WORD_BOUNDARY in parts else ""

    @cached_property
    def _bytes(self) -> Mapping[str, int]:
        """Byte by the character that byte-level BPE writes for it."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {character: byte for byte, character in bytes_to_unicode().items()}

    def _as_text(self, ids: list[int]) -> list[int]:
        """Unigram models find special tokens in text by their vocabulary: there, their characters."""
        if self._in_no_text.isdisjoint(ids):
            return ids
        unknown = [] if self.unknown is None else [id_of(self._pipeline, self.unknown)]
        spelled: list[int] = []
        for one in ids:
            if one not in self._in_no_text:
                spelled.append(one)
                continue
            for character in self.token(one):
                known = self._pipeline.token_to_id(character)
                spelled += unknown if known is None else [known]
        return spelled

    def _mask(self) -> dict[str, object]:
        """As tokenizer.json has it: whether it takes the space before it along."""
        number = id_of(self._pipeline, self.tokens["mask"])
        added = self._pipeline.get_added_tokens_decoder().get(number) or tokenizers.AddedToken(self.tokens["mask"])
        flags = {name: getattr(added, name) for name in ("content", "lstrip", "rstrip", "normalized", "single_word")}
        return {"__type": "AddedToken", "special": True, **flags}


def _finished(pipeline: tokenizers.Tokenizer, content: bytes, tokens: Mapping[str, str]) -> bytes:
    """tokenizer.json of a pipeline that cuts and pads nothing, draws nothing, and adds a begin and an end.

    It is content, from which the pipeline was read, where that is so already.
    """
    changes = not content
    if pipeline.truncation or pipeline.padding or getattr(pipeline.model, "dropout", None):
        pipeline.no_truncation()
        pipeline.no_padding()
        if hasattr(pipeline.model, "dropout"):
            pipeline.model.dropout = None
        changes = True
    bos, eos = tokens["bos"], tokens["eos"]
    ends = [id_of(pipeline, bos), id_of(pipeline, eos)]
    if pipeline.encode("", add_special_tokens=True).ids != ends:
        template = processors.TemplateProcessing(
            single=f"{bos} $A {eos}",
            pair=f"{bos} $A {eos} $B:1 {eos}:1",
            special_tokens=[(bos, ends[0]), (eos, ends[1])] if bos != eos else [(bos, ends[0])],
        )
        before = pipeline.post_processor
        is_byte_level = isinstance(before, processors.ByteLevel)  # it trims offsets
        pipeline.post_processor = processors.Sequence([before, template]) if is_byte_level else template
        changes = True
    return pipeline.to_str(pretty=True).encode() if changes else content


def _converted(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """From files of a class of transformers, or from a SentencePiece model alone."""
    from transformers import AutoTokenizer  # late, as it takes a second

    alone = [path for path in sorted(folder.iterdir()) if path.suffix == ".model"]
    if len(alone) == 1 and not any((folder / name).is_file() for name in ("config.json", CONFIG_FILE)):
        return _of_sentencepiece(alone[0]), {}
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        pipeline: tokenizers.Tokenizer = found.backend_tokenizer
    except Exception as error:  # of many kinds, as every class reads files of its own
        raise unreadable(folder, error) from error
    return tokenizers.Tokenizer.from_str(pipeline.to_str()), dict(found.special_tokens_map)


def _of_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

    class Extractor(SentencePieceExtractor):  # type: ignore[misc]  # transformers has no types
        """Called as SpmConverter calls it, which transformers' own no longer allows."""

        def extract(self, scores: object) -> tuple[object, object]:  # type: ignore[override]
            found: Any = super().extract(models.BPE)
            return found["vocab"], found["merges"]

    class Converter(SpmConverter):  # type: ignore[misc]
        SpmExtractor = Extractor
        handle_byte_fallback = True

    try:
        pipeline: tokenizers.Tokenizer = Converter(SimpleNamespace(vocab_file=str(path))).converted()
    except Exception as error:  # of protobuf, of transformers, plain ones
        raise unreadable(path, error) from error
    return pipeline
