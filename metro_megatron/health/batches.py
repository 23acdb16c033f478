"""What must hold of every batch: masks on words alone, samples apart, every rank its own part of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.parallel.layout import Layout


def problems(config: Config, layout: Layout, batch: StepBatch, following: StepBatch | None) -> Iterator[str]:
    """Of a step's batch on the host, and of the next one, if there is one. A collective call, to be exhausted."""
    for micro_batch in batch.micro_batches:
        yield from _masks(config, micro_batch)
        yield from _samples(config, micro_batch)
    yield from _parts(layout, batch)
    yield from _noise([batch, following] if following else [batch])


def _masks(config: Config, micro_batch: MicroBatch) -> Iterator[str]:
    is_masked, tokens, shown = micro_batch.is_masked, micro_batch.tokens, micro_batch.masked_tokens
    special_ids = config.model.special_ids
    if not micro_batch.is_real[is_masked].all() or np.isin(tokens[is_masked], special_ids.reserved).any():
        yield "masks lie on padding or on special tokens"
    if (shown != tokens)[~is_masked].any():
        yield "the masked text differs from the text where nothing is masked"
    objective = config.objective
    if objective.keep_probability == objective.random_probability == 0 and (shown[is_masked] != special_ids.mask).any():
        yield "masked tokens are shown: the auxiliary would read what it has to name"
    if not torch.equal(micro_batch.masked_targets, tokens.t().reshape(-1)[micro_batch.masked_index]):
        yield "targets at the masks are not the tokens of the text"


def _samples(config: Config, micro_batch: MicroBatch) -> Iterator[str]:
    lengths = micro_batch.sample_lengths[micro_batch.sample_lengths > 0].long()
    begins = lengths.cumsum(0) - lengths
    expected = torch.arange(int(lengths.sum())) - begins.repeat_interleave(lengths)
    if not torch.equal(micro_batch.position_ids[micro_batch.is_real], expected):
        yield "positions do not begin at 0 with every sample"
    real = micro_batch.tokens[micro_batch.is_real]
    special_ids = config.model.special_ids
    if (real[begins] != special_ids.bos).any() or (real[begins + lengths - 1] != special_ids.eos).any():
        yield "samples do not begin with <s> and end with </s>: their lengths are not where they lie"


def _parts(layout: Layout, batch: StepBatch) -> Iterator[str]:
    """All data-parallel ranks together have the samples of the step, each once, and the counts that divide losses."""
    places = [int(place) for one in batch.micro_batches for place in _places(one) if place >= 0]
    masked = sum(one.masked_index.numel() for one in batch.micro_batches)
    tokens = sum(int(one.is_real.sum()) for one in batch.micro_batches)
    everyone: list[tuple[list[int], int, int]] = [([], 0, 0)] * layout.data.size()
    dist.all_gather_object(everyone, (places, masked, tokens), group=layout.data)
    found = sorted(place for rank_places, _, _ in everyone for place in rank_places)
    if found != list(range(batch.end - batch.num_samples, batch.end)):
        yield "data-parallel ranks do not share out the samples of a step: some are read twice, or by nobody"
    counted = sum(one[1] for one in everyone), sum(one[2] for one in everyone)
    if counted != (batch.num_masked, batch.num_tokens):
        yield (
            f"losses are divided by {batch.num_masked} masked and {batch.num_tokens} real tokens, "
            f"but the step has {counted[0]} and {counted[1]}"
        )


def _places(micro_batch: MicroBatch) -> list[int]:
    assert micro_batch.sample_places is not None
    return micro_batch.sample_places.tolist()


def _noise(batches: Sequence[StepBatch]) -> Iterator[str]:
    keys = [tuple(key) for batch in batches for one in batch.micro_batches for key in one.noise_keys.tolist()]
    if len(set(keys)) < len(keys):
        yield "the noise of replacements has the same keys at several masks, or in the next step again"
