"""How many rows a step has and how long they are, as far as counts of samples and tokens decide it.

Packed rows: every data-parallel rank gets as many, all rows of a step are equally long, and no longer than its samples
need. Their lengths are numbers of seven binary digits and a multiple of 16, so that a run meets a handful of shapes
and rounding wastes less than a 64th.

Legend: M micro batches of a rank's step, dp data-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from metro_megatron.config.schema import Config, DataConfig, ParallelConfig

GRAIN = 16
"""Rows are a multiple of this: tiles of matrix products."""
FULL_ROW_SAMPLES = 6
"""So many samples a packed row fill it to 97%, with five it is luck (tests/data/test_fill.py)."""


@dataclass(frozen=True)
class RowRule:
    """What the rows of a step must be like."""

    data: DataConfig
    parallel: ParallelConfig
    dp_size: int
    grain: int = GRAIN
    """Rows are a multiple of this: FP8 products read a multiple of 16 places on every tensor-parallel rank."""

    @classmethod
    def of(cls, config: Config, dp_size: int) -> RowRule:
        is_split = config.train.fp8_recipe != "none" and config.parallel.sequence_parallel
        grain = GRAIN * (config.parallel.tensor_model_parallel_size if is_split else 1)
        return cls(config.data, config.parallel, dp_size, grain)

    @property
    def least_micro_batches(self) -> int:
        """The interleaved schedule needs a micro batch for every stage."""
        return self.parallel.pipeline_model_parallel_size if self.parallel.is_interleaved else 1

    def num_rows(self, least: int, num_samples: int) -> int:
        """Packed rows of all ranks, `least` or more, of which each is a micro batch.

        As many on every rank, and where samples are enough a multiple of the pipeline's stages, which share phase 1.
        """
        stages = self.parallel.pipeline_model_parallel_size
        of_rank = -(-least // self.dp_size)
        shared = -(-of_rank // stages) * stages
        of_rank = max(of_rank, min(shared, num_samples // self.dp_size), self.least_micro_batches)
        return of_rank * self.dp_size

    def row_length(self, tokens: int) -> int:
        """The least length of a packed row for so many tokens; data.micro_batch_tokens where it takes more."""
        grain = math.lcm(self.grain, 1 << (tokens.bit_length() - 7) if tokens >= 1 << 7 else 1)
        if self.parallel.sequence_parallel:
            grain = math.lcm(grain, self.parallel.tensor_model_parallel_size)
        return min(-(-tokens // grain) * grain, self.data.micro_batch_tokens)

    def row_lengths(self, tokens: int, below: int) -> list[int]:
        """All lengths of packed rows for so many tokens that are less than `below`, ascending."""
        found = []
        while (length := self.row_length(tokens)) < below:
            found.append(length)
            if length == self.data.micro_batch_tokens:
                break
            tokens = length + 1
        return found

    def first_try(self, tokens: int, num_samples: int, longest: int) -> tuple[int, int]:
        """(rows, their length) that hold so many tokens if samples can be laid into them without a gap."""
        rows = self.num_rows(-(-tokens // self.data.micro_batch_tokens), num_samples)
        return rows, self.row_length(max(longest, -(-tokens // rows)))
