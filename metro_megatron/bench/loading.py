"""Rates of what feeds a training step: building the sample index, and batches of a rank."""

import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from metro_megatron.config import Config
from metro_megatron.data.samples import build_sample_index
from metro_megatron.train.corpus import Corpus

SEQ_LENGTH = 512
_MEDIAN_TOKENS, _SIGMA = 280.0, 1.28
"""Of a document's lognormal length, as Wikipedia's."""
_UNIT_TOKENS = 25


@dataclass(frozen=True)
class SyntheticShard:
    """Units without tokens, as the index needs none."""

    unit_lengths: NDArray[np.int32]
    document_index: NDArray[np.int64]
    tokens: NDArray[np.int32]
    dataset: str = ""
    first_document: int = 0

    @classmethod
    def of_documents(cls, num_documents: int) -> "SyntheticShard":
        """Lognormal documents, in units of 5 to 45 tokens."""
        generator = np.random.default_rng(0)
        tokens = generator.lognormal(np.log(_MEDIAN_TOKENS), _SIGMA, num_documents)
        units = np.maximum(1, (tokens / _UNIT_TOKENS).astype(np.int64))
        document_index = np.concatenate([[0], np.cumsum(units)])
        lengths = generator.integers(5, 2 * _UNIT_TOKENS - 4, document_index[-1], dtype=np.int32)
        return cls(lengths, document_index, np.empty(0, np.int32))


def index_rate(num_documents: int) -> dict[str, float]:
    """Samples per second of build_sample_index on synthetic documents, in memory."""
    shard = SyntheticShard.of_documents(num_documents)
    start = time.perf_counter()
    index = build_sample_index([shard], SEQ_LENGTH)
    seconds = time.perf_counter() - start
    return {"samples": len(index), "seconds": seconds, "samples_per_s": len(index) / seconds}


def loader_rate(prefix: str, vocab_size: int, seconds: float = 5.0) -> dict[str, float]:
    """Tokens per second of one rank's packed, masked batches, without prefetching: one core."""
    torch.set_num_threads(1)
    config = Config()
    config = replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        data=replace(config.data, train=[prefix], seq_length=SEQ_LENGTH),
    )
    layout = SimpleNamespace(data=SimpleNamespace(rank=lambda: 0, size=lambda: 1), device=torch.device("cpu"))
    data = Corpus.open(config).training_data(cast(Any, layout))
    batch = data.step_batch(0, 0)
    start, step, tokens = time.perf_counter(), 0, 0
    while time.perf_counter() - start < seconds:
        step += 1
        batch = data.step_batch(step, batch.end)
        tokens += batch.num_tokens
    elapsed = time.perf_counter() - start
    return {"steps": step, "tokens": tokens, "seconds": elapsed, "tokens_per_s": tokens / elapsed}
