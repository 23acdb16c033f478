"""The benchmark of Fast-ELECTRA counts what it says and runs on the CPU."""

import csv
from pathlib import Path

import pytest

from benchmarks.bench_fast_electra import ARMS, main
from metro_megatron.cli.command_line import call_with_options
from metro_megatron.errors import UserError
from tests.benchmarks.test_bench_train import OPTIONS

BATCH = ["--train.global_batch_tokens", "512", "--model.vocab_size", "384"]  # no rows of padding


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(UserError, match="corruption.source is uniform; leave it out, every arm sets its own"):
        call_with_options(main, [*OPTIONS, *BATCH, "--corruption.source", "uniform"])
    with pytest.raises(UserError, match="train.global_batch_tokens is 30, less than one sample of data.seq_length 64"):
        call_with_options(main, [*OPTIONS, "--train.global_batch_tokens", "30"])


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trial_on_the_cpu(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*OPTIONS, *BATCH, "--train.precision", precision, "--rounds", "3", "--output", str(tmp_path / "fast")]
    call_with_options(main, argv)
    with (tmp_path / "fast.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == list(ARMS)
    zero, twice, frozen, cached = [float(row["gflop_counted"]) for row in rows]
    assert twice > zero > frozen > cached
    for row in rows:
        # The plan has the table of distances multiplied once more than it is: much of so small a model.
        assert float(row["gflop_counted"]) == pytest.approx(float(row["gflop_planned"]), rel=2e-3)
        states = sum(float(row[f"{name}_mb"]) for name in ("weights", "gradients", "optimizer"))
        assert states == pytest.approx(float(row["planned_mb"]), rel=0.02), "buffers round small tensors up"
        assert 0 < float(row["lower_quartile"]) <= float(row["time_ratio"]) <= float(row["upper_quartile"])
    assert [row["paper_flops"] for row in rows] == ["", "", "20 to 30%", "30 to 40%"]
    assert "wrote" in capsys.readouterr().out
