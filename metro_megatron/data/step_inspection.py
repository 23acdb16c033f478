"""What a step of a run trains on, as text with its masks."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from metro_megatron.config import Config
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.inspection import TextView, token_starts
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.samples import SampleIndex
from metro_megatron.data.shards import Shard
from metro_megatron.data.tokenizer import MASK_ID


def logged_positions(metrics: Path) -> dict[int, int]:
    """Global position of the first sample of steps (0-based) that a run's metrics.jsonl tells; 0 for step 0."""
    positions = {0: 0}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        try:
            figures = json.loads(line)
            positions[int(figures["step"])] = int(figures["consumed_samples"])
        except (ValueError, KeyError, TypeError):
            continue  # of a validation, or cut short while the run goes on
    return positions


def first_position(
    data: PretrainingData,
    config: Config,
    step: int,
    known: dict[int, int],
    on_step: Callable[[int], object] = lambda step: None,
) -> int:
    """Global position of the first sample of a step (0-based).

    Batches of tokens hold as many samples as fit: they are counted from the nearest known step on, and `on_step` hears
    of each.
    """
    if config.train.global_batch_size:
        return step * config.train.global_batch_size
    nearest = max(one for one in known if one <= step)
    position = known[nearest]
    for number in range(nearest, step):
        position = data.step_batch(number, position).end
        on_step(number)
    return position


def describe_step(
    batch: StepBatch, index: SampleIndex, shards: Sequence[Shard], view: TextView, count: int
) -> Iterator[str]:
    """The first `count` samples of a step, micro batch by micro batch, each with its masks.

    A sample's tokens and masks are those of the batch itself; the shard tells where units and documents begin.
    """
    left = count
    for number, micro_batch in enumerate(batch.micro_batches):
        rows = micro_batch.tokens.shape[0]
        for sample, row, begin, end in _placed(micro_batch):
            if left == 0:
                return
            left -= 1
            ids = micro_batch.tokens[row, begin:end].tolist()
            is_masked = (micro_batch.masked_tokens[row, begin:end] == MASK_ID).tolist()
            place = f"micro batch {number}, " + (f"row {row}" if rows > 1 else f"places {begin:,} to {end - 1:,}")
            yield _describe_sample(index, shards, sample, (ids, is_masked), view, place)


def _placed(batch: MicroBatch) -> Iterator[tuple[int, int, int, int]]:
    """Sample id, row, first and last + 1 column of every sample."""
    begin = 0
    for row, (sample, length) in enumerate(zip(batch.sample_ids.tolist(), batch.sample_lengths.tolist(), strict=True)):
        if sample >= 0:
            yield (sample, 0, begin, begin + length) if batch.is_packed else (sample, row, 0, length)
            begin += length


def _describe_sample(
    index: SampleIndex,
    shards: Sequence[Shard],
    sample: int,
    tokens: tuple[list[int], list[bool]],
    view: TextView,
    place: str,
) -> str:
    ids, is_masked = tokens
    shard = shards[int(index.shard[sample])]
    token = int(index.start[sample])
    starts, size = token_starts(shard), shard.tokens.itemsize
    unit = bisect_right(starts, token * size) - 1
    document = bisect_right(shard.document_index, unit) - 1
    head = (
        f"sample {sample:,} ({place}): {shard.prefix}, document {document:,}, tokens {token:,} to "
        f"{token + len(ids) - 3:,}; {len(ids):,} with <s> and </s>, {sum(is_masked):,} masked"
    )
    lines = []
    at = 1
    while at < len(ids) - 1:
        unit_start = int(starts[unit]) // size
        unit_end = unit_start + int(shard.unit_lengths[unit])
        cut = min(len(ids) - 1, 1 + unit_end - token)
        begins_unit = token + at - 1 == unit_start
        lines.append("  " + view.text(ids[at:cut], is_masked[at:cut], begins_unit))
        at, unit = cut, unit + 1
    return "\n".join([head, *lines])
