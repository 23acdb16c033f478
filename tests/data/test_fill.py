"""Steps of every preset are full, and where they cannot be, the run says what would help."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from metro_megatron.config.file import load_config
from metro_megatron.config.problems import problems
from metro_megatron.config.rows import FULL_ROW_SAMPLES, RowRule
from metro_megatron.config.schema import Config, DataConfig, ParallelConfig, TrainConfig
from metro_megatron.data import fill
from metro_megatron.data.batch import StepRows
from metro_megatron.data.fill import FULL, LEAST, STEPS, advice, filled, tried_samples
from metro_megatron.data.samples import build_sample_index

EXAMPLES = Path(__file__).parents[2] / "examples"
GPUS = [2**power for power in range(3, 10)]
METRO = dict.fromkeys(GPUS, 0.976)
WORST: dict[str, dict[int, float]] = {
    **dict.fromkeys(("base", "base_pp", "large_pp", "xl", "xxl"), METRO),
    "electra_small": {8: 0.983, 16: 0.981, 32: 0.944, 64: 0.848, 128: 0.784},
    "electra_base": {8: 0.986, 16: 0.985, 32: 0.981, 64: 0.937, 128: 0.698, 256: 0.578},
}
"""Of the places, those that hold tokens in the worst of 200 steps, by preset and GPUs; elsewhere a run is refused."""
WITHOUT_BETTER = {("electra_small", 64), ("electra_base", 64), ("electra_base", 128)}
"""No rows could hold more in the worst step."""


@pytest.fixture
def drawn(make_shard, lognormal_documents):
    """drawn(seq_length, count): lengths of so many samples of Wikipedia's assumed documents."""

    shard = make_shard(lognormal_documents(1500))
    lengths = {seq_length: build_sample_index([shard], seq_length).length + 2 for seq_length in (128, 512)}

    def draw(seq_length, count):
        return np.random.default_rng(1).choice(lengths[seq_length], count).astype(np.int64)

    return draw


def preset(name):
    config = load_config(EXAMPLES / f"{name}.yaml")
    return replace(config, data=replace(config.data, train=["x"]), train=replace(config.train, output="x"))


def least_length(lengths, num_rows):
    """No rows can be shorter: of the k n + 1 longest samples, some row of n has k + 1."""
    ordered = np.sort(lengths)[::-1]
    of_some_row = [
        ordered[k * num_rows - k : k * num_rows + 1].sum() for k in range(1, (len(lengths) - 1) // num_rows + 1)
    ]
    return int(max([ordered[0], *of_some_row]))


@pytest.mark.parametrize("steps", [8, pytest.param(200, marks=pytest.mark.long)])
def test_every_preset_is_as_full_as_its_batch_can_be(drawn, steps):
    """METRO's on 8 to 512 GPUs, ELECTRA's small one on 16 and its base one on 32 to 97% and more."""
    found: dict[tuple[object, ...], tuple[float, str | None]] = {}
    for name, by_gpus in WORST.items():
        config = preset(name)
        batch, seq_length = config.train.global_batch_size, config.data.seq_length
        for gpus in GPUS:
            refused = problems(config, gpus, "cuda")
            assert [one for one in refused if "train.global_batch_size" in one] == refused
            assert (gpus in by_gpus) == (not refused), (name, gpus)
            if refused:
                continue
            dp_size = gpus // config.parallel.model_ranks
            key = seq_length, config.data.micro_batch_tokens, str(config.parallel), batch, dp_size
            lengths = drawn(seq_length, steps * batch)
            if key not in found:
                more = drawn(seq_length, STEPS * tried_samples(config, dp_size))
                found[key] = min(filled(config, dp_size, lengths)), advice(config, dp_size, more)
            share, said = found[key]
            print(f"{name} on {gpus}: {share:.2%} of the places filled")
            assert share >= by_gpus[gpus], (name, gpus)
            assert (said is None) == (by_gpus[gpus] >= LEAST), (name, gpus, said)
            if steps == 200 and name.startswith("electra"):
                assert share < by_gpus[gpus] + 0.01, "the table is what is measured"
            if steps == 200 and (name, gpus) in WITHOUT_BETTER:
                worst = min(lengths.reshape(steps, -1), key=lambda one: next(filled(config, dp_size, one)))
                rule = RowRule.of(config, dp_size)
                assert rule.row_length(least_length(worst, dp_size)) == StepRows.of(worst, rule).length, (name, gpus)


@pytest.mark.parametrize(("seq_length", "dp_size"), [(128, 8), (128, 64), (512, 8), (512, 64)])
def test_what_a_refusal_calls_enough_is(drawn, seq_length, dp_size):
    """Six samples a row, of any length, and with pipeline stages too; two are not."""
    for stages, samples, is_full in ((1, FULL_ROW_SAMPLES, True), (2, FULL_ROW_SAMPLES, True), (1, 2, False)):
        batch = samples * dp_size * stages
        config = config_of({"seq_length": seq_length}, {"global_batch_size": batch})
        config = replace(config, parallel=ParallelConfig(pipeline_model_parallel_size=stages))
        shares = list(filled(config, dp_size, drawn(seq_length, 16 * batch)))
        assert len(shares) == 16 and (min(shares) >= FULL) == is_full, min(shares)


def config_of(data=None, train=None):
    return Config(data=DataConfig(**(data or {})), train=TrainConfig(**(train or {"global_batch_size": 2048})))


def advised(said, name):
    """The value that advice names for an option."""
    before, _, after = said.partition(f"{name} ")
    assert after, said
    return int(after.split()[0])


@pytest.mark.parametrize("unit", ["global_batch_size", "global_batch_tokens"])
def test_a_batch_that_cannot_fill_its_ranks_is_told_the_smallest_that_does(drawn, unit):
    lengths = drawn(512, STEPS * 16 * 128)
    mean = 1 if unit == "global_batch_size" else lengths.mean()
    said = advice(config_of(train={unit: round(256 * mean)}), 128, lengths)
    assert said and said.startswith("only 7")
    value = advised(said, f"train.{unit}")
    smaller = [round(samples * mean) for samples in range(384, round(value / mean), 128)]
    *less, most = (
        min(islice(filled(config_of(train={unit: size}), 128, lengths), STEPS)) for size in (*smaller, value)
    )
    assert (
        all(share < FULL for share in less) and most >= FULL and said.endswith(f"would fill {int(1000 * most) / 10}%")
    )


def test_a_share_just_below_the_limit_is_not_rounded_to_it(drawn, monkeypatch):
    monkeypatch.setattr(fill, "filled", lambda *_: iter([0.89999]))
    assert "only 89.9% of the places" in fill.advice(config_of(), 8, drawn(512, 4096))
    assert fill.advice(config_of(), 8, drawn(512, 4096)).endswith("start fewer processes"), "as nothing helps"


def test_the_option_that_costs_least_is_named(drawn):
    lengths = drawn(512, 5 * 2048)
    assert advice(config_of(), 8, lengths) is None
    said = advice(config_of({"row_format": "padded"}), 8, lengths)
    assert said and "data.row_format packed would fill 99." in said
    said = advice(config_of({"row_format": "padded", "micro_batch_tokens": 500}), 8, lengths)
    assert said and "data.row_format packed with data.micro_batch_tokens 16384" in said, "rows that hold a sample"
    said = advice(config_of({"micro_batch_tokens": 512}), 256, lengths)
    assert said and advised(said, "data.micro_batch_tokens") in (1024, 2048)
    assert advice(config_of({"micro_batch_tokens": advised(said, "data.micro_batch_tokens")}), 256, lengths) is None
