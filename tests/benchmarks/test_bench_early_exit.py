"""The benchmark of early exit counts what it says and runs on the CPU."""

import csv
from pathlib import Path

import pytest

from benchmarks.bench_early_exit import main
from metro_megatron.cli.command_line import call_with_options
from metro_megatron.errors import UserError
from tests.benchmarks.test_bench_train import OPTIONS

BATCH = ["--train.global_batch_tokens", "512", "--model.num_layers", "4"]


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(UserError, match="early_exit.layers is empty"):
        call_with_options(main, [*OPTIONS, *BATCH])
    with pytest.raises(UserError, match="--shares 1: must be at least 0 and less than 1"):
        call_with_options(main, [*OPTIONS, *BATCH, "--early_exit.layers", "1", "--shares", "0.5", "1"])


@pytest.mark.long
def test_a_trial_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*OPTIONS, *BATCH, "--early_exit.layers", "1", "2", "--shares", "0", "0.5", "--rounds", "3"]
    call_with_options(main, [*argv, "--output", str(tmp_path / "exits")])
    with (tmp_path / "exits.csv").open() as file:
        nobody, half = csv.DictReader(file)
    assert float(nobody["average_depth"]) == 4 > float(half["average_depth"]) > 2.5
    assert 1 < float(nobody["flops_ratio"]) < 1.01, "the exits' heads"
    assert float(half["flops_ratio"]) < 1
    for row in (nobody, half):
        assert 0 < float(row["lower_quartile"]) <= float(row["time_ratio"]) <= float(row["upper_quartile"])
    assert "wrote" in capsys.readouterr().out
