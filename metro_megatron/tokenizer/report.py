"""What a tokenizer makes of text: figures in all and per source, and report.json beside the tokenizer."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import sentencepiece

from metro_megatron.text.documents import SourcedDocument
from metro_megatron.tokenizer.engines import Engine
from metro_megatron.tokenizer.tokenizer import MODEL_FILE, WORD_BOUNDARY
from metro_megatron.vocabulary import NUM_SPECIALS

REPORT_FILE = "report.json"

_NUM_BYTES = 256
_FIRST_NORMAL = NUM_SPECIALS + _NUM_BYTES
_BATCH_UNITS = 4096


@dataclass(frozen=True)
class Figures:
    """Of one text."""

    documents: int
    text_bytes: int
    """UTF-8."""
    tokens: int
    tokens_per_word: float
    """Fertility; words are what white space separates."""
    bytes_per_token: float
    byte_fallback_rate: float
    """Share of tokens that are single bytes."""
    coverage: float
    """Share of characters that have a piece of their own; the rest is spelled in bytes where no piece holds it."""
    used_ids: float
    """Share of the ids above specials and bytes that occur."""


class _Count:
    """Adds up one source."""

    def __init__(self, vocab_size: int):
        self.documents = self.text_bytes = self.words = 0
        self.characters: Counter[str] = Counter()
        self.ids = np.zeros(vocab_size, np.int64)

    def add(self, engine: Engine, units: Sequence[str]) -> None:
        text = "\n".join(units)
        self.text_bytes += len(text.encode()) - (len(units) - 1)
        self.words += len(text.split())
        self.characters.update(text)
        self.characters["\n"] -= len(units) - 1
        self.ids += np.bincount(engine.encode(units)[0], minlength=len(self.ids))

    def __iadd__(self, other: "_Count") -> "_Count":
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.words += other.words
        self.characters.update(other.characters)
        self.ids += other.ids
        return self

    def figures(self, alphabet: frozenset[str]) -> Figures:
        tokens, characters = int(self.ids.sum()), self.characters.total()
        covered = sum(count for character, count in self.characters.items() if character in alphabet)
        return Figures(
            self.documents,
            self.text_bytes,
            tokens,
            tokens / max(1, self.words),
            self.text_bytes / max(1, tokens),
            float(self.ids[NUM_SPECIALS:_FIRST_NORMAL].sum() / max(1, tokens)),
            covered / max(1, characters),
            float(np.count_nonzero(self.ids[_FIRST_NORMAL:]) / max(1, len(self.ids) - _FIRST_NORMAL)),
        )


def measure(folder: Path, documents: Iterable[SourcedDocument]) -> dict[str, Figures]:
    """Figures of every source in the order of its first document; of all text, under "all", where there are several."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL_FILE))
    vocab_size = processor.get_piece_size()
    engine = Engine.create(folder)
    counts: dict[str, _Count] = {}
    for source, group in groupby(documents, key=lambda document: document.source):
        count = counts.setdefault(source, _Count(vocab_size))
        batch: list[str] = []
        for document in group:
            count.documents += 1
            batch += document.units
            if len(batch) >= _BATCH_UNITS:
                count.add(engine, batch)
                batch = []
        if batch:
            count.add(engine, batch)
    if len(counts) > 1:
        whole = _Count(vocab_size)
        for count in counts.values():
            whole += count
        counts["all"] = whole
    pieces = map(processor.id_to_piece, range(_FIRST_NORMAL, vocab_size))
    alphabet = frozenset(" " if piece == WORD_BOUNDARY else piece for piece in pieces if len(piece) == 1)
    return {source: count.figures(alphabet) for source, count in counts.items()}


def write_report(folder: Path, figures: dict[str, Figures], sample: dict[str, object]) -> None:
    """Write report.json: `sample` says what was trained on."""
    report = {**sample, "sources": {source: asdict(one) for source, one in figures.items()}}
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / REPORT_FILE).write_text(text, encoding="utf-8")


def table(figures: dict[str, Figures]) -> list[str]:
    """Lines of a table, a source a line."""
    width = max(6, *(len(source) for source in figures))
    lines = [f"  {'source':<{width}}  documents       MB  tokens/word  bytes/token  byte tokens  coverage  ids used"]
    for source, one in figures.items():
        sizes = f"{one.documents:>10,} {one.text_bytes / 1e6:>8,.1f}"
        ratios = f"{one.tokens_per_word:>12.3f} {one.bytes_per_token:>12.3f}"
        shares = f"{one.byte_fallback_rate:>12.3%} {one.coverage:>9.3%} {one.used_ids:>9.1%}"
        lines.append(f"  {source or '-':<{width}} {sizes} {ratios} {shares}")
    return lines
