"""Text that a tiny model learns something of within a hundred steps: documents that say their few words again."""

from __future__ import annotations

import numpy as np

from tests.parity.small_run import MemoryShard

FIRST = 5
"""Ids below are special."""
OWN = 3
"""Words that a document has of its own."""
SHARE = 0.9
"""Of a document's text that is of its own words; the rest, and the own words, are drawn by their frequency."""


def repeating_text(seed: int, vocab_size: int, num_tokens: int = 200_000) -> MemoryShard:
    """Sentences of 4 to 20 words in documents of 1 to 8, over a Zipfian vocabulary."""
    rng = np.random.default_rng(seed)
    words = vocab_size - FIRST
    frequencies = 1 / np.arange(10, words + 10)
    frequencies /= frequencies.sum()
    sentences = rng.integers(4, 21, num_tokens // 12)
    ends = np.minimum(rng.integers(1, 9, len(sentences)).cumsum(), len(sentences))
    index = np.unique(np.concatenate([[0], ends])).astype(np.int64)
    length = np.diff(np.concatenate([[0], sentences.cumsum()])[index])
    own = rng.choice(words, size=(len(length), OWN), p=frequencies)
    document = np.repeat(np.arange(len(length)), length)
    common = rng.choice(words, size=len(document), p=frequencies)
    is_own = rng.random(len(document)) < SHARE
    text = np.where(is_own, own[document, rng.integers(0, OWN, len(document))], common)
    shard = MemoryShard((FIRST + text).astype(np.uint16), sentences.astype(np.int32), index)
    shard.manifest["vocab_size"] = vocab_size
    return shard
