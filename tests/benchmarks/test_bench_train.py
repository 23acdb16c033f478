"""The benchmark of whole steps counts as it says, fits every preset on one GPU, and runs on the CPU."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bench_train import main
from benchmarks.results import Results
from benchmarks.step_profile import Interval, gap_percent, largest, sums
from benchmarks.synthetic_shards import write_synthetic_dataset
from benchmarks.training import (
    CHOICES,
    Plan,
    StepBench,
    StepRow,
    add_gains,
    bench_config,
    layout_config,
    prepare_data,
)
from fused.dispatch import OPERATOR_NAMES
from metro_megatron.cli.command_line import call_with_options
from metro_megatron.config.file import load_config
from metro_megatron.config.problems import problems
from metro_megatron.data.shards import open_shards
from metro_megatron.errors import UserError
from metro_megatron.plan.memory import state_bytes

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE_GPU = 141e9
TINY = {
    "model": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "ffn_hidden_size": 64,
        "num_layers": 2,
        "auxiliary_num_layers": 1,
        "vocab_size": 300,
        "max_position_embeddings": 64,
    },
    "data": {"seq_length": 64, "micro_batch_tokens": 256},
    "train": {"device": "cpu", "precision": "fp32"},
}
OPTIONS = [f"--{section}.{name}={value}" for section, values in TINY.items() for name, value in values.items()]


@pytest.mark.parametrize("name", ["base", "large_pp", "xl", "xxl"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_every_preset_fits_one_gpu(name: str, layout: str, tmp_path: Path) -> None:
    preset = load_config(EXAMPLES / f"{name}.yaml")
    config, changes = bench_config(preset, 8, 1, ONE_GPU)
    config = layout_config(
        prepare_data(replace(config, data=replace(config.data, train=["x"])), Plan(), tmp_path), layout
    )
    assert problems(config, 1, "cuda") == []
    assert 0.98 < config.train.global_batch_tokens / (8 * config.data.micro_batch_size * 512) <= 0.99
    assert config.data.micro_batch_tokens == config.data.micro_batch_size * 512
    assert state_bytes(preset) < ONE_GPU
    text = " ".join(changes)
    assert ("--parallel.recompute full" in text) == (name == "xxl") == (config.parallel.recompute == "full")
    assert ("--parallel.tensor_model_parallel_size 1 --parallel.sequence_parallel false" in text) == ("xl" in name)
    if name == "xxl":
        assert state_bytes(preset) == pytest.approx(108e9, rel=0.01)
        assert bench_config(preset, 8, 4, ONE_GPU)[1] == []


def test_choices_are_those_of_table_5() -> None:
    assert ("torch", *OPERATOR_NAMES, "all") == CHOICES
    base = {"layout": "packed", "fused": "torch", "status": "ok", "seconds_per_step": 3.0, "peak_gb": 10.0}
    row = {**base, "fused": "all", "seconds_per_step": 2.0, "peak_gb": 8.0}
    add_gains(row, [{**base, "layout": "padded", "seconds_per_step": 9.0}, base])
    assert (row["speed_gain_percent"], row["memory_gain_percent"]) == pytest.approx((50.0, 20.0))
    failed = {**row, "status": "failed: x"}
    add_gains(failed, [base])
    assert failed == {**row, "status": "failed: x"}


def test_gaps_and_largest_kernels() -> None:
    intervals = [Interval("a", 0, 4), Interval("b", 2, 5), Interval("a", 8, 10), Interval("c", 3, 4)]
    assert gap_percent(reversed(intervals)) == pytest.approx(30.0)
    rows = largest(sums(intervals))
    assert [(row["name"], row["count"], row["ms"]) for row in rows] == [
        ("a", 2, 0.006),
        ("b", 1, 0.003),
        ("c", 1, 0.001),
    ]
    assert rows[0]["percent"] == pytest.approx(60.0) and gap_percent([]) == 100.0


def test_synthetic_documents_are_a_real_dataset(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path / "s", 200_000, 128_000)
    (shard,) = open_shards([str(tmp_path / "s")])
    assert shard.vocab_size == 128_000 and shard.tokens.dtype == np.int32
    assert 100_000 < len(shard.tokens) < 400_000
    assert shard.tokens.min() >= 5 and shard.tokens.max() < 128_000


def test_a_row_that_fails_says_why_and_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    session = StepBench.__new__(StepBench)
    session.plan, session.device, session._trainer = Plan(), torch.device("cpu"), None

    def fail(layout: str) -> None:
        raise errors.pop()

    errors = [RuntimeError("two\nlines"), torch.OutOfMemoryError("CUDA out of memory")]
    monkeypatch.setattr(session, "_get_trainer", fail)
    assert "try --parallel.recompute full" in session.row(StepRow("packed"))["status"]
    assert session.row(StepRow("packed", "none"))["status"] == "failed: RuntimeError: two lines"
    session.plan = Plan(processes=2)
    errors.append(RuntimeError("alone"))
    with pytest.raises(RuntimeError, match="alone"):  # the other rank must not wait
        session.row(StepRow("packed"))


def test_runs_are_appended(tmp_path: Path) -> None:
    for number in range(2):
        results = Results(tmp_path / "r", {"commit": f"c{number}"}, ("x", "y"), append=True)
        results.add({"x": number, "hidden": 1})
        results.note(profile=[1])
    assert [run["rows"] for run in json.loads((tmp_path / "r.json").read_text())] == [
        [{"x": n, "hidden": 1}] for n in (0, 1)
    ]
    assert (tmp_path / "r.csv").read_text().split() == ["x,y,commit", "0,,c0", "1,,c1"]


@pytest.mark.long
def test_a_trial_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, trace = tmp_path / "out" / "train", tmp_path / "trace.json.gz"
    options = ["--warm_up", "1", "--steps", "2", "--micro_batches", "2", "--table5", "--layouts", "packed"]
    argv = [*options, "--profile", str(trace), "--output", str(prefix), "--preset", "tiny", *OPTIONS]
    assert call_with_options(main, argv) == 0
    with prefix.with_name("train.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["fused"] for row in rows] == list(CHOICES)
    for row in rows:
        assert row["status"] == "ok" and row["preset"] == "tiny" and row["torch"] == torch.__version__
        tokens, slots, pad = (float(row[name]) for name in ("tokens_per_s", "slot_tokens_per_s", "pad_percent"))
        assert tokens / slots == pytest.approx(1 - pad / 100) and 0 < pad < 50
        assert 448 < slots * float(row["seconds_per_step"]) < 513  # two rows of at most 256
        mfu = 100 * tokens * float(row["gflop_per_token"]) / 1e3 / float(row["matrix_tflops"])
        assert float(row["mfu_percent"]) == pytest.approx(mfu)
        assert 0 <= float(row["data_percent"]) < 100
    assert float(rows[-1]["speed_gain_percent"]) == pytest.approx(
        100 * (float(rows[0]["seconds_per_step"]) / float(rows[-1]["seconds_per_step"]) - 1)
    )
    assert "traceEvents" in json.loads(gzip.decompress(trace.read_bytes()))
    (run,) = json.loads(prefix.with_name("train.json").read_text())
    assert len(run["profile"]["largest"]) == 15
    assert "changed for this machine: nothing" in capsys.readouterr().out


def test_time_that_is_up_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_with_options(main, ["--layouts", "padded", "--budget_s", "0", *OPTIONS]) == 0
    output = capsys.readouterr().out
    assert "not run: the time was up" in output and "nothing was written" in output
    with pytest.raises(UserError, match="--steps is 0, must be at least 1"):
        call_with_options(main, ["--steps", "0", *OPTIONS])
    with pytest.raises(UserError, match="num_attention_heads is 3"):
        call_with_options(main, [*OPTIONS, "--model.num_attention_heads", "3"])
