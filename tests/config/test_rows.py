import pytest

from metro_megatron.config.rows import RowRule
from metro_megatron.config.schema import DataConfig, ParallelConfig


def rule(most=16384, dp_size=1, **parallel):
    return RowRule(DataConfig(micro_batch_tokens=most), ParallelConfig(**parallel), dp_size)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 16), (16, 16), (17, 32), (127, 128), (1009, 1024), (2049, 2080), (4097, 4160), (10656, 10752), (16129, 16256)],
)
def test_lengths_have_seven_binary_digits(tokens, expected):
    assert rule().row_length(tokens) == expected
    assert expected % 16 == 0 and (tokens < 1024 or expected < tokens * (1 + 1 / 64))


def test_no_row_is_longer_than_the_most():
    assert [rule(1000).row_length(tokens) for tokens in (990, 993, 5000)] == [992, 1000, 1000]
    assert rule(1000).row_lengths(900, below=950) == [912, 928, 944]
    assert rule(1000).row_lengths(970, below=5000) == [976, 992, 1000]
    assert rule(1000).row_lengths(970, below=970) == []
    # A run whose steps have 3.5% more or less tokens than the mean meets this many shapes.
    assert len(rule().row_lengths(10283, below=11029)) == 6


def test_positions_are_split_evenly_with_sequence_parallelism():
    split = rule(768, tensor_model_parallel_size=6, sequence_parallel=True)
    assert split.row_lengths(300, below=400) == [336, 384]


@pytest.mark.parametrize(
    ("least", "samples", "parallel", "expected"),
    [
        (42, 2048, {}, 48),
        (48, 2048, {}, 48),
        (1, 2048, {}, 8),
        # Stages share phase 1, as far as there are samples.
        (42, 2048, {"pipeline_model_parallel_size": 4}, 64),
        (42, 60, {"pipeline_model_parallel_size": 4}, 56),
        (42, 50, {"pipeline_model_parallel_size": 4}, 48),
        (1, 9, {"pipeline_model_parallel_size": 4}, 8),
        # The interleaved schedule has a micro batch for every stage, whatever there is.
        (1, 9, {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}, 32),
    ],
)
def test_as_many_rows_on_each_of_eight_ranks(least, samples, parallel, expected):
    assert rule(dp_size=8, **parallel).num_rows(least, samples) == expected
