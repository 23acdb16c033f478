"""The whole command: runs are those of the single command, and a second call finds them."""

import json
import re
from pathlib import Path

import pytest
import yaml

from metro_megatron.cli.command_line import call_with_options, exit_code
from metro_megatron.commands import finetune, sweep
from metro_megatron.hf.card import pretraining_flops
from tests.finetune.conftest import bert, export_folder, no_network
from tests.finetune.layouts import write_glue, write_nli

__all__ = ["bert", "export_folder", "no_network"]


@pytest.mark.long
def test_runs_of_a_sweep_are_those_of_the_single_command(
    export_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    data = write_glue(tmp_path / "glue")
    argv = ["--model", str(export_folder), "--data", str(data), "--device", "cpu", "--epochs", "1", "--seed", "1"]
    output = tmp_path / "out"
    whole = [*argv, "--task", "mnli", "rte", "--output", str(output), "--workers", "2"]
    assert exit_code(lambda: call_with_options(sweep.main, whole)) == 0
    printed = capsys.readouterr().out
    assert "2 runs, 0 of them finished before" in printed and "GLUE/CoLA.tsv: missing, no run of cola" in printed
    assert re.search(r"GLUE/RTE.tsv: missing, \S+predictions_test.jsonl has 4 predictions, the test has 3,000", printed)
    single = [*argv, "--task", "mnli", "--output", str(tmp_path / "single")]
    assert exit_code(lambda: call_with_options(finetune.main, single)) == 0
    (found,) = output.glob("runs/mnli-1-*")
    alone, of_sweep = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "single", found))
    assert of_sweep["epochs"] == alone["epochs"] and of_sweep["accuracy_mm"] == alone["accuracy_mm"]
    files = {path.name for path in (tmp_path / "single").glob("predictions*.jsonl")}
    assert files == {path.name for path in found.glob("predictions*.jsonl")} and len(files) == 5
    for name in files:
        assert (found / name).read_bytes() == (tmp_path / "single" / name).read_bytes()

    tables = {name: (output / name).read_bytes() for name in ("table.md", "points.csv", "runs.csv")}
    capsys.readouterr()
    assert exit_code(lambda: call_with_options(sweep.main, whole)) == 0
    assert "2 runs, 2 of them finished before" in capsys.readouterr().out
    assert {name: (output / name).read_bytes() for name in tables} == tables
    assert (output / "boxes.png").is_file() and not (output / "flops.png").exists()


def test_mistakes_come_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--output", str(tmp_path / "out"), "--task", "classification", "--model", "m", "--train_file", "t"]
    argv += ["--validation_file", "v"]
    assert exit_code(lambda: call_with_options(sweep.main, [*argv, "--rows", "modell", "sed"])) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --rows modell: no option of tools/finetune.py; did you mean model?",
        "error: --rows sed: no option of tools/finetune.py; did you mean seed?",
    ]
    assert exit_code(lambda: call_with_options(sweep.main, [*argv, "--seed", "1", "2", "--batch_size", "4", "8"])) == 2
    errors = capsys.readouterr().err.splitlines()
    for error, said in zip(errors, ("t: must be named", "v: must be named", "m: no such folder"), strict=True):
        assert error.startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


def test_what_runs_would_refuse_comes_before_any_run(
    export_folder: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"--{one}_file={tmp_path / one}.csv" for one in ("train", "validation")]
    for one in ("train", "validation"):
        (tmp_path / f"{one}.csv").write_text(f"text,label\n{one} a,x\n{one} b,y\n")
    argv = ["--model", str(export_folder), str(bert), "--output", str(tmp_path / "out"), "--device", "cpu"]
    mistaken = [*files, "--task", "classification", "--batching", "packed", "random", "--class_weights", "1", "2", "3"]
    assert exit_code(lambda: call_with_options(sweep.main, [*argv, *mistaken])) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: class_weights has 3 numbers, but there are 2 classes; give one for each of x, y",
        "error: batching is packed, but encoders of type 'bert' read one text in a row; use length",
    ]
    write_glue(tmp_path / "data")
    write_nli(tmp_path / "data")
    together = ["--task", "mnli_plus", "--data", str(tmp_path / "data"), "--keep_best", "true"]
    assert exit_code(lambda: call_with_options(sweep.main, [*argv, *together])) == 2
    assert "keep_best and patience are for one task" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_from_scratch_have_no_pretraining(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\npretraining: {flops: 2.5e+18}\n---\n")
    row = {"model": str(tmp_path), "from_scratch": False}
    assert sweep._flops(row) == 2.5e18 and sweep._flops({**row, "from_scratch": True}) is None


@pytest.mark.parametrize("header", ["", "---\npretraining: [\n---\n", "---\n- a\n---\n", "--- a\n"])
def test_flops_are_read_from_a_card_s_header(tmp_path: Path, header: str) -> None:
    (tmp_path / "README.md").write_text(f"{header}# a card\n")
    assert pretraining_flops(tmp_path) is None and pretraining_flops(tmp_path / "nowhere") is None
    text = yaml.safe_dump({"license": "mit", "pretraining": {"step": 3, "flops": 2.5e18}})
    (tmp_path / "README.md").write_text(f"---\n{text}---\n# a card\n")
    assert pretraining_flops(tmp_path) == 2.5e18
