"""A shard in memory, whose tokens tell their offset: token at offset o of shard k is 5 + k * 10**6 + o."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from metro_megatron.data.documents import TokenizedDocuments

TOKENS_PER_SHARD = 10**6


@pytest.fixture
def make_shard() -> Callable[..., TokenizedDocuments]:
    """make_shard([[3, 4], [5]], number=0): a document of units of 3 and 4 tokens and one of one unit of 5."""

    def make(documents: Sequence[Sequence[int]], number: int = 0) -> TokenizedDocuments:
        lengths = np.array([length for units in documents for length in units], dtype=np.int32)
        assert lengths.sum() < TOKENS_PER_SHARD
        return TokenizedDocuments(
            unit_lengths=lengths,
            document_index=np.cumsum([0, *map(len, documents)], dtype=np.int64),
            tokens=np.arange(lengths.sum(), dtype=np.int32) + 5 + number * TOKENS_PER_SHARD,
            dataset=f"dataset {number}",
        )

    return make


@pytest.fixture
def lognormal_documents() -> Callable[..., list[list[int]]]:
    """lognormal_documents(n): n documents with Wikipedia's assumed lengths (median 280, mean 640 tokens), in
    units of 5 to 45 tokens."""

    def make(num_documents: int, median: float = 280.0, seed: int = 0) -> list[list[int]]:
        generator = np.random.default_rng(seed)
        documents = []
        for total in np.maximum(1, generator.lognormal(np.log(median), 1.28, num_documents).astype(int)):
            ends = np.cumsum(generator.integers(5, 46, total // 5 + 1))
            documents.append(np.diff([0, *ends[ends < total], total]).tolist())
        return documents

    return make
