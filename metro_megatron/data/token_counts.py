"""How often each id is in some shards: counted once, and found again under a hash of what was counted."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.blocks import TokenStreams
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.shards import Shard
from metro_megatron.errors import UserError
from metro_megatron.files import locked, whole_files

_CHUNK = 1 << 24
"""Ids counted at a time, which numpy widens to 8 bytes each."""


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

    Raises UserError if the folder cannot be written or a file in it is damaged, and as `count_tokens`.
    """
    facts = json.dumps([vocab_size, [shard.sha256 for shard in shards]])
    path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:24]}.counts.npy"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock"), wait=True):
                if not path.exists():
                    with whole_files([path]) as (file,):
                        np.save(file, count_tokens(shards, vocab_size))
        counts = np.load(path)
    except OSError as error:
        raise UserError(
            f"token counts {path}: {error.strerror} ({error.filename}); set data.index_cache to a folder that can be "
            "written"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove it, it is made again") from error
    if counts.shape != (vocab_size,) or counts.sum() != sum(len(shard.tokens) for shard in shards):
        raise UserError(f"{path}: damaged; remove it, it is made again")
    return counts
