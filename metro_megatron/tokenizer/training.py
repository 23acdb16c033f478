"""Training a tokenizer folder: SentencePiece, and the equal tokenizer.json.

The result is compared with SentencePiece on the sample before anything is written under its final name.
"""

import io
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from metro_megatron.errors import UserError
from metro_megatron.tokenizer.tokenizer import copy_tokenizer
from metro_megatron.tokenizer.tokenizer_json import check_equal, write_folder
from metro_megatron.vocabulary import BOS_ID, EOS_ID, NUM_SPECIALS, PAD_ID, SPECIAL_TOKENS, UNK_ID

CHARACTER_COVERAGE = 0.9995
"""Share of the sample's characters that get pieces of their own; the rest is spelled in bytes."""

MOST_IDS = 128_000
"""METRO's."""
BYTES_PER_ID = 500
"""Of text, where the size is chosen: a piece is then seen some hundred times."""

_CHECK_BYTES = 8_000_000
_TRAINER_THREADS = 8
"""Recorded in the model, so a constant: the file must not depend on the machine."""


@dataclass(frozen=True)
class TrainingReport:
    """What a tokenizer was trained on."""

    vocab_size: int
    sampled_documents: int
    sampled_bytes: int
    checked_bytes: int
    """On which tokenizer.json was shown to equal tokenizer.model."""
    seconds: float


class VocabularySizeError(UserError):
    """A vocabulary that a text does not support; `fitting` is the nearest size that it does."""

    def __init__(self, problem: str, fitting: int):
        self.fitting = fitting
        super().__init__(problem)


def train_tokenizer(documents: Sequence[list[str]], vocab_size: int, output: Path) -> TrainingReport:
    """Train on all given documents and write the tokenizer folder `output`, of `vocab_size` ids; 0: as many as fit.

    Raises UserError, with nothing written, if the documents are too few or too varied for that size, or
    tokenizer.json would differ from SentencePiece on them.
    """
    start = time.monotonic()
    units = [unit for document in documents for unit in document]
    if not units:
        raise UserError("no documents to train a tokenizer on; check --input and --sample_bytes")
    sampled_bytes = sum(len(unit.encode()) for unit in units)
    size = vocab_size or fitting_vocab_size(sampled_bytes)
    try:
        model = train_sentencepiece(units, size)
    except VocabularySizeError as error:
        if vocab_size:
            raise
        size = error.fitting
        model = train_sentencepiece(units, size)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_folder(model, partial)
        check = units[:: 1 + sampled_bytes // _CHECK_BYTES]
        check_equal(partial, check)
        copy_tokenizer(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    checked_bytes = sum(len(unit.encode()) for unit in check)
    return TrainingReport(size, len(documents), sampled_bytes, checked_bytes, time.monotonic() - start)


def fitting_vocab_size(text_bytes: int) -> int:
    """A power of two, of which a text shows every piece often enough; at most MOST_IDS, at least 512."""
    return min(MOST_IDS, 1 << max(9, (text_bytes // BYTES_PER_ID).bit_length() - 1))


def train_sentencepiece(units: Sequence[str], vocab_size: int) -> bytes:
    """The serialized SentencePiece model: cased BPE with byte fallback; equal units give equal bytes."""
    smallest = NUM_SPECIALS + 256 + 1
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} is below {smallest}: 5 specials, 256 bytes and the space")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(units),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=CHARACTER_COVERAGE,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            bos_id=BOS_ID,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            control_symbols=[SPECIAL_TOKENS[-1]],
            max_sentence_length=1 << 30,
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(str(error), vocab_size) from error
    return writer.getvalue()


def _explained(message: str, vocab_size: int) -> UserError:
    if highest := re.search(r"set it to a value <= (\d+)", message):
        what = f"vocab_size {vocab_size} is above {highest[1]}, all this text supports; lower it or give more"
        return VocabularySizeError(what, int(highest[1]))
    if lowest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        what = f"vocab_size {vocab_size} is below the {lowest[1]} that this text's characters need; raise it"
        return VocabularySizeError(what, 1 << int(lowest[1]).bit_length())
    return UserError(f"SentencePiece could not train: {message}")
