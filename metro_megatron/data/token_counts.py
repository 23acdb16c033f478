"""How often each id is in some shards: counted once, and found again under a hash of what was counted."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.blocks import TokenStreams
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.records import SEAL, DamagedRecord, from_plain, sealed, unsealed
from metro_megatron.data.shards import Shard
from metro_megatron.errors import UserError
from metro_megatron.files import content_of, locked, write_whole

_ENDING = ".counts.json"

_CHUNK = 1 << 24
"""Ids counted at a time, which numpy widens to 8 bytes each."""


@dataclass(frozen=True)
class TokenCounts:
    """As they are stored."""

    counts: tuple[int, ...]
    """[V]"""


def count_tokens(shards: Sequence[TokenizedDocuments], vocab_size: int) -> NDArray[np.int64]:
    """Counts [V] over all ids of the shards, in bounded memory. Raises UserError where they are damaged on the disk."""
    counts, streams = np.zeros(vocab_size, np.int64), TokenStreams(shards)
    for number, tokens in enumerate(streams.arrays):
        for first in range(0, len(tokens), _CHUNK):
            chunk = tokens[first : first + _CHUNK]
            streams.check(*(np.array([one]) for one in (number, first, len(chunk))))
            counts += np.bincount(chunk, minlength=vocab_size)
    return counts


def cached_token_counts(shards: Sequence[Shard], vocab_size: int, folder: Path) -> NDArray[np.int64]:
    """`count_tokens`, from `folder` or counted into it; processes wait for each other as for a sample index.

    Damaged counts are made again, which is said. Raises UserError if the folder cannot be written, and as
    `count_tokens`.
    """
    facts = json.dumps([vocab_size, [shard.sha256 for shard in shards]])
    path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:24]}{_ENDING}"
    try:
        if (stored := _stored(path, vocab_size)) is not None:
            return stored
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), wait=True):
            if (stored := _stored(path, vocab_size)) is not None:
                return stored
            if path.exists():
                print(f"{path}: damaged; is made again", file=sys.stderr, flush=True)
            counts = count_tokens(shards, vocab_size)
            write_whole(path, sealed(TokenCounts(tuple(counts.tolist()))))
            return counts
    except OSError as error:
        raise UserError(
            f"token counts {path}: {error.strerror} ({error.filename}); set data.index_cache to a folder that can be "
            "written"
        ) from error


def token_count_problems(folder: Path) -> Iterator[str]:
    """A line for each damaged file of counts in a folder, if there is one."""
    for path in sorted(folder.glob(f"*{_ENDING}")):
        if _stored(path) is None:
            yield f"{path}: damaged; remove it, it is made again"


def _stored(path: Path, vocab_size: int | None = None) -> NDArray[np.int64] | None:
    """Counts of a file; None where there is none, where it is damaged, or of another size [V]."""
    try:
        content = content_of(path)
        counts = from_plain(TokenCounts, unsealed(content)).counts
    except (FileNotFoundError, DamagedRecord):
        return None
    is_whole = SEAL.encode() in content and len(counts) == (vocab_size or len(counts))
    return np.array(counts, np.int64) if is_whole else None
