"""Which documents are held out for evaluation: told from what they say, not from where they lie.

So all lists of datasets, in any order, cut, merged or copied in any way, hold out the same documents, and of a document
that comes twice both copies or none.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.blocks import TokenStreams
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.randomness import Purpose, uniform

_KEY_BYTES = 8


def held_out_by_content(
    shard: TokenizedDocuments, token_starts: NDArray[np.int64], fraction: float
) -> NDArray[np.bool_]:
    """Which of consecutive documents [D] are held out; document d is tokens token_starts[d] to token_starts[d + 1].

    Raises UserError where they are damaged on the disk.
    """
    first, last = int(token_starts[0]), int(token_starts[-1])
    if last > first:
        TokenStreams([shard]).check(np.zeros(1, np.int64), token_starts[:1], token_starts[-1:] - first)
    # The same bytes whatever the ids are stored in.
    ids = np.ascontiguousarray(shard.tokens[first:last], "<i4").view(np.uint8)
    bounds = (4 * (token_starts - first)).tolist()
    digests = (
        hashlib.blake2b(ids[begin:end].data, digest_size=_KEY_BYTES).digest()
        for begin, end in zip(bounds, bounds[1:], strict=False)
    )
    return uniform(Purpose.SPLIT, np.frombuffer(b"".join(digests), "<u8")) < fraction


def held_out_by_place(dataset: int, documents: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """As runs of earlier releases held documents out: by the dataset's number in the list and theirs in it."""
    return uniform(Purpose.SPLIT, dataset, documents) < fraction
