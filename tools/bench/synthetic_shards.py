"""A dataset of random documents, written as tools/preprocess_data.py writes one, without text or tokenizer.

D documents, U units.
"""

import json
from pathlib import Path

import numpy as np

from metro_megatron.data.shards import FORMAT_VERSION, DatasetPaths, shard_suffix, token_dtype
from metro_megatron.preprocess.shard_writer import shard_writer
from metro_megatron.vocabulary import NUM_SPECIALS
from tools.bench.loading import SyntheticShard

_MEAN_TOKENS = 500


def write_synthetic_dataset(prefix: Path, num_tokens: int, vocab_size: int) -> None:
    """Documents of lognormal length with about num_tokens uniform ids in all, and their manifest."""
    shard = SyntheticShard.of_documents(max(100, num_tokens // _MEAN_TOKENS))
    lengths, documents = shard.unit_lengths, np.diff(shard.document_index)
    dtype, generator = token_dtype(vocab_size), np.random.default_rng(1)
    total = int(lengths.sum(dtype=np.int64))
    paths = DatasetPaths(str(prefix))
    with shard_writer(paths.shard(0).prefix, dtype) as writer:
        writer.append([generator.integers(NUM_SPECIALS, vocab_size, total, dtype=dtype)], lengths, documents)
        entry = {"name": shard_suffix(0), **writer.finish()}
    counts = {name: entry[name] for name in ("documents", "units", "tokens")}
    manifest = {
        "format_version": FORMAT_VERSION,
        "tokenizer_sha256": "",
        "vocab_size": vocab_size,
        **counts,
        "sources": [{"name": "synthetic", **counts}],
        "shards": [entry],
    }
    paths.manifest.write_text(json.dumps(manifest))
