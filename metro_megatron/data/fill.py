"""How much of a step's rows is padding, and which option makes it less.

Legend: dp data-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.problems import row_problems
from metro_megatron.config.rows import RowRule
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepRows
from metro_megatron.data.steps import step_samples

LEAST = 0.9
"""Of the places in a step's rows, those that must hold tokens; a run with fewer warns."""
FULL = 0.97
"""Those that do after the change it names."""
STEPS = 16
"""So many are looked at."""
MOST_SAMPLES = 16
"""Of a rank's step for each of its pipeline's stages, in the batches that are tried; FULL_ROW_SAMPLES are enough."""


def filled(config: Config, dp_size: int, lengths: NDArray[np.int64]) -> Iterator[float]:
    """Share of the places that hold tokens, for each of the whole steps of these samples."""
    rule, first = RowRule.of(config, dp_size), 0
    while count := step_samples(lengths[first:], config.train):
        of_step = lengths[first : first + count]
        yield int(of_step.sum()) / StepRows.of(of_step, rule).num_places
        first += count


def advice(config: Config, dp_size: int, lengths: NDArray[np.int64]) -> str | None:
    """What to change if one of the next steps leaves more than a tenth of its places empty; None if none does.

    Named is the first change with which all of these steps are FULL, else the best one. lengths: of the next samples,
    specials included, for STEPS steps of the run's batch and of `tried_samples`.
    """
    share = _least(config, dp_size, lengths, default=1.0)
    if share >= LEAST:
        return None
    better, most = "start fewer processes", LEAST
    for remedy, changed in _remedies(config, dp_size, float(lengths.mean())):
        found = _least(changed, dp_size, lengths)
        if found > most:
            better, most = f"{remedy} would fill {_percent(found)}", found
        if found >= FULL:
            break
    return (
        f"only {_percent(share)} of the places in a step's rows hold tokens, the rest is padding that costs as much; "
        f"{better}"
    )


def tried_samples(config: Config, dp_size: int) -> int:
    """Of the largest batch that advice() may name."""
    return MOST_SAMPLES * config.parallel.pipeline_model_parallel_size * dp_size


def _least(config: Config, dp_size: int, lengths: NDArray[np.int64], default: float = 0.0) -> float:
    """Of `filled` in STEPS steps, or `default` without any."""
    return min(islice(filled(config, dp_size, lengths), STEPS), default=default)


def _percent(share: float) -> str:
    """Rounded down, so that it is less than a limit if the share is."""
    return f"{math.floor(1000 * share) / 10:.1f}%"


def _remedies(config: Config, dp_size: int, mean: float) -> Iterator[tuple[str, Config]]:
    """Changes of one option, two where it must be, by what is lost with them, with the option's name and value."""
    data, train = config.data, config.train
    if not data.is_packed:
        remedy, packed = "data.row_format packed", replace(config, data=replace(data, row_format="packed"))
        if any(row_problems(packed)):  # padded rows do not read micro_batch_tokens, which may be anything
            places = data.micro_batch_slots
            packed = replace(packed, data=replace(packed.data, micro_batch_tokens=places))
            remedy += f" with data.micro_batch_tokens {places}"
        yield remedy, packed
    else:
        for tokens in (data.micro_batch_tokens * factor for factor in (2, 4, 8)):
            changed = replace(config, data=replace(data, micro_batch_tokens=tokens))
            yield f"data.micro_batch_tokens {tokens}", changed
    for samples in range(dp_size, tried_samples(config, dp_size) + 1, dp_size):
        tokens = round(samples * mean)
        if samples > train.global_batch_size > 0:
            yield f"train.global_batch_size {samples}", replace(config, train=replace(train, global_batch_size=samples))
        elif train.global_batch_size == 0 and tokens > train.global_batch_tokens:
            yield (
                f"train.global_batch_tokens {tokens}",
                replace(config, train=replace(train, global_batch_tokens=tokens)),
            )
