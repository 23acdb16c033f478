"""The benchmark of fine-tuning trains the same texts in rows of every kind."""

import csv
from pathlib import Path

import pytest

from benchmarks.bench_finetune import KINDS, main
from metro_megatron.cli.command_line import call_with_options


@pytest.mark.long
def test_a_trial_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--hidden_size", "64", "--num_layers", "1", "--texts", "64", "--rounds", "2"]
    call_with_options(main, [*argv, "--output", str(tmp_path / "finetune")])
    with (tmp_path / "finetune.csv").open() as file:
        rows = {row["rows"]: row for row in csv.DictReader(file)}
    assert tuple(rows) == KINDS
    assert float(rows["padded"]["time_ratio"]) == 1
    assert all(float(row[name]) > 0 for row in rows.values() for name in ("texts_per_second", "processor_ratio"))
    assert "wrote" in capsys.readouterr().out
