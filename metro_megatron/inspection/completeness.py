"""Whether a dataset holds all that was planned: every byte of its input files was read by one of the run's tasks."""

from collections.abc import Iterator
from itertools import pairwise

from metro_megatron.data.manifest import DatasetPaths, InputEntry, Manifest
from metro_megatron.text.inputs import PARQUET, kind


def missing_inputs(prefix: str, manifest: Manifest) -> Iterator[str]:
    """A line for each input file of which parts were not read; for none of a dataset that is itself a task's part."""
    if manifest.num_shards > 1:
        return
    for source in manifest.sources:
        for file in source.files:
            gaps = list(_gaps(file))
            if gaps:
                unit = "row groups" if _is_parquet(file) else "bytes"
                listed = ", ".join(f"{begin:,} to {end:,}" for begin, end in gaps)
                yield (
                    f"{DatasetPaths(prefix).manifest}: {unit} {listed} of {file.name}"
                    f"{f' of source {source.name}' if source.name else ''} were never read: a task is missing; "
                    "merge all of them again with tools/merge_shards.py"
                )


def _gaps(file: InputEntry) -> Iterator[tuple[int, int]]:
    """Ranges between pieces, and before the first and behind the last; how many row groups there are is not known."""
    pieces = sorted((begin, end) for begin, end, _ in file.pieces)
    last = pieces[-1][1] if pieces and _is_parquet(file) else file.bytes
    for (_, end), (begin, _) in pairwise([(0, 0), *pieces, (last, last)]):
        if end < begin:
            yield end, begin


def _is_parquet(file: InputEntry) -> bool:
    return kind(file.name)[0] in PARQUET
