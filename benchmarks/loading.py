"""Rates of what feeds a training step: building the sample index, and batches of a rank."""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from metro_megatron.cli.command_line import run_tool
from metro_megatron.config.schema import Config
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.samples import SampleRule, build_sample_index, cached_sample_index
from metro_megatron.train.corpus import Corpus

SEQ_LENGTH = 512
_MEDIAN_TOKENS, _SIGMA = 280.0, 1.28
"""Of a document's lognormal length, as Wikipedia's."""
_UNIT_TOKENS = 25
_SHARD_DOCUMENTS = 1_000_000


@dataclass(frozen=True)
class _HashedDocuments(TokenizedDocuments):
    """With the hashes that the cache of indices asks a shard for."""

    sha256: str = ""
    index_sha256: str = ""


def synthetic_documents(num_documents: int) -> _HashedDocuments:
    """Lognormal documents, in units of 5 to 45 tokens; without the tokens, as the index needs none."""
    generator = np.random.default_rng(0)
    tokens = generator.lognormal(np.log(_MEDIAN_TOKENS), _SIGMA, num_documents)
    units = np.maximum(1, (tokens / _UNIT_TOKENS).astype(np.int64))
    document_index = np.concatenate([[0], np.cumsum(units)])
    lengths = generator.integers(5, 2 * _UNIT_TOKENS - 4, document_index[-1], dtype=np.int32)
    return _HashedDocuments(np.empty(0, np.int32), lengths, document_index, "synthetic")


@dataclass(frozen=True)
class Options:
    """How much, and where."""

    samples: int
    """Samples of the index, at least."""
    folder: Path
    """Where the index is made, and dropped."""


def main(options: Options) -> None:
    """Build a sample index of synthetic documents and print its rate as JSON."""
    print(json.dumps(build_index(options.samples, options.folder)), end="")


def build_index(num_samples: int, folder: Path) -> dict[str, float]:
    """Build the sample index of at least `num_samples` samples below `folder`, then drop it.

    Its shards have a million documents each.
    """
    shard = synthetic_documents(_SHARD_DOCUMENTS)
    per_shard = len(build_sample_index([shard], SEQ_LENGTH))
    count = -(-num_samples // per_shard)
    shards = [replace(shard, first_document=number * _SHARD_DOCUMENTS) for number in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        start = time.perf_counter()
        index = cached_sample_index(cast(Any, shards), SampleRule(SEQ_LENGTH), Path(fresh))
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


if __name__ == "__main__":
    run_tool(main)
