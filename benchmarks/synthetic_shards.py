"""A dataset of random documents, written as tools/preprocess_data.py writes one, without text or tokenizer.

D documents, U units.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.loading import synthetic_documents
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.manifest import DatasetPaths, Statistics
from metro_megatron.data.records import to_json
from metro_megatron.data.shards import token_dtype
from metro_megatron.preprocess.assembly import shard_writer
from metro_megatron.preprocess.journal import Plan
from metro_megatron.preprocess.options import PlanOptions
from metro_megatron.preprocess.output import dataset_manifest, source_entry
from metro_megatron.vocabulary import NUM_SPECIALS

_MEAN_TOKENS = 500


def write_synthetic_dataset(prefix: Path, num_tokens: int, vocab_size: int, document_tokens: int = 0) -> None:
    """Documents with about num_tokens uniform ids in all, and their manifest.

    Their length is lognormal, or document_tokens each.
    """
    if document_tokens:
        count = max(1, num_tokens // document_tokens)
        each = np.full(count, document_tokens, np.int32)
        made = TokenizedDocuments(np.empty(0, np.int32), each, np.arange(count + 1))
    else:
        made = synthetic_documents(max(100, num_tokens // _MEAN_TOKENS))
    total = int(made.unit_lengths.sum(dtype=np.int64))
    tokens = np.random.default_rng(1).integers(NUM_SPECIALS, vocab_size, total, dtype=token_dtype(vocab_size))
    write_dataset(prefix, replace(made, tokens=tokens), vocab_size)


def write_dataset(prefix: Path, made: TokenizedDocuments, vocab_size: int) -> None:
    """One shard of these documents, and its manifest."""
    lengths, dtype = made.unit_lengths, token_dtype(vocab_size)
    paths = DatasetPaths(str(prefix))
    with shard_writer(paths.shard(0).prefix, dtype) as writer:
        writer.append([made.tokens.astype(dtype, copy=False)], lengths, np.diff(made.document_index))
        shard = writer.finish()
    plan = Plan("", "synthetic", PlanOptions().planned(), ())
    token_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[made.document_index]
    source = source_entry(plan, [], [], Statistics.of(np.diff(token_starts), lengths), [])
    manifest = dataset_manifest("", vocab_size, plan.options, [source], [shard])
    paths.manifest.write_bytes(to_json(manifest))
