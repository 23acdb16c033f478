"""The documents of a finished dataset by its sources, in blocks, whatever its size."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from metro_megatron.data.shards import DatasetPaths, token_dtype
from metro_megatron.preprocess.parts import Block, Part


def shard_part(prefix: str, manifest: dict[str, Any], number: int) -> Part:
    """Shard `number` of a dataset as a part."""
    entry = manifest["shards"][number]
    paths = DatasetPaths(prefix).shard(number)
    return Part.of_shard(paths.prefix, token_dtype(manifest["vocab_size"]), entry["units"], entry["documents"])


def source_of(manifest: dict[str, Any], document: int) -> int:
    """Place in the manifest of the source that a document, by its number in the dataset, comes from."""
    ends = np.cumsum([source["documents"] for source in manifest["sources"]])
    return int(np.searchsorted(ends, document, side="right"))


def source_blocks(prefix: str, manifest: dict[str, Any]) -> Iterator[tuple[int, Block]]:
    """(source, documents) of all shards in order; no block holds documents of two sources or shards."""
    ends = np.cumsum([source["documents"] for source in manifest["sources"]]).tolist()
    first = 0
    for number, entry in enumerate(manifest["shards"]):
        last = first + entry["documents"]
        borders = [first, *sorted({end for end in ends if first < end < last}), last]
        part = shard_part(prefix, manifest, number)
        for begin, end in zip(borders, borders[1:], strict=False):
            source = source_of(manifest, begin)
            for block in part.from_document(begin - first, end - first).blocks():
                yield source, block
        first = last
