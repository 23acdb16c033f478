"""The whole command: runs are those of the single command, and a second call finds them."""

import json
import re
from pathlib import Path

import pytest
import yaml

from metro_megatron.cli.command_line import call_with_options, exit_code
from metro_megatron.commands import finetune, sweep
from metro_megatron.hf.card import pretraining_flops
from tests.finetune.conftest import export_folder, no_network
from tests.finetune.layouts import write_glue

__all__ = ["export_folder", "no_network"]


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
    for error, said in zip(errors, ("m: no such folder", "t: must be named", "v: must be named"), strict=True):
        assert error.startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("header", ["", "---\npretraining: [\n---\n", "---\n- a\n---\n", "--- a\n"])
def test_flops_are_read_from_a_card_s_header(tmp_path: Path, header: str) -> None:
    (tmp_path / "README.md").write_text(f"{header}# a card\n")
    assert pretraining_flops(tmp_path) is None and pretraining_flops(tmp_path / "nowhere") is None
    text = yaml.safe_dump({"license": "mit", "pretraining": {"step": 3, "flops": 2.5e18}})
    (tmp_path / "README.md").write_text(f"---\n{text}---\n# a card\n")
    assert pretraining_flops(tmp_path) == 2.5e18
