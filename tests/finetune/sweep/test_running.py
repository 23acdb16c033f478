"""A sweep does every run once, whatever happens to it, and its tables do not tell what happened."""

import csv
import io
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from metro_megatron.cli.command_line import call_with_options, exit_code
from metro_megatron.commands import finetune
from metro_megatron.commands import sweep as sweep_command
from metro_megatron.errors import UserError
from metro_megatron.finetune.sweep.outcome import Outcome, one_answer
from metro_megatron.finetune.sweep.plan import Plan, hashed, read_plan
from metro_megatron.finetune.sweep.points import picked, points
from metro_megatron.finetune.sweep.running import Runner, slots
from metro_megatron.finetune.sweep.table import markdown, points_csv, runs_csv

ROOT = Path(__file__).parents[3]
FAKE = (sys.executable, str(Path(__file__).with_name("fake.py")))
SLOT = {"OMP_NUM_THREADS": "1"}


def plan_of(root: Path, *tokens: str) -> Plan:
    """Of two files and a model that are there."""
    for name in ("train.csv", "validation.csv"):
        (root / name).write_text("text,label\n")
    (root / "model").mkdir(exist_ok=True)
    (root / "model" / "config.json").write_text("{}")
    files = ("--model", f"{root}/model", "--train_file", f"{root}/train.csv", "--validation_file")
    task = () if "--task" in tokens else ("--task", "classification")
    return hashed(read_plan([*files, f"{root}/validation.csv", *task, *tokens], finetune.Options))


def sweep(root: Path, plan: Plan, workers: int = 2, keep_models: bool = False) -> list[Outcome]:
    return Runner(root / "out" / "runs", [SLOT] * workers, keep_models, FAKE).outcomes(plan.runs, lambda outcome: None)


def tables(plan: Plan, outcomes: list[Outcome]) -> tuple[str, str, str]:
    found = points(outcomes, plan.varied, ["model"])
    return markdown(found), points_csv(found), runs_csv(outcomes)


def calls(root: Path) -> list[str]:
    return sorted((root / "calls").read_text().splitlines())


GRID = ("--learning_rate", "1", "0.5", "--seed", "1", "2")
DRIVER = """
import sys
from pathlib import Path
from tests.finetune.sweep.test_running import GRID, plan_of, sweep
sweep(Path(sys.argv[1]), plan_of(Path(sys.argv[1]), *GRID), workers=1)
"""


def test_killed_and_resumed_gives_the_same_tables(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out/runs/*/log.txt"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    plan = plan_of(tmp_path, *GRID)
    assert len(list(tmp_path.glob("out/runs/*/metrics.json"))) == 2
    # The third run has outlived its sweep, and goes on while the next one begins.
    (tmp_path / "hold").unlink()
    resumed = tables(plan, sweep(tmp_path, plan))
    assert calls(tmp_path) == ["0.5 1", "0.5 2", "1.0 1", "1.0 2"]
    for path in tmp_path.glob("out/runs/*"):
        assert {file.name for file in path.iterdir()} == {
            "lock",
            "log.txt",
            "metrics.json",
            "predictions.jsonl",
            "run.json",
        }
    assert tables(plan, sweep(tmp_path, plan)) == resumed and len(calls(tmp_path)) == 4

    (tmp_path / "out").rename(tmp_path / "killed")
    assert tables(plan, sweep(tmp_path, plan)) == resumed and len(calls(tmp_path)) == 8


def test_failed_runs_are_named_and_stand_below_all_others(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--learning_rate", "1", "2", "3", "4", "--seed", "1", "2", "3", "4", "5")
    outcomes = sweep(tmp_path, plan)
    failures = {
        (run.run.values["learning_rate"], run.run.values["seed"]): run.failure for run in outcomes if run.failure
    }
    one_answer, no_number = 'every text got the answer "a"', "a loss or score is no finite number"
    assert failures == {
        **{(2.0, seed): one_answer for seed in (3, 4, 5)},
        **{(3.0, seed): no_number for seed in range(1, 6)},
        **{(4.0, seed): "exit code 1: out of memory" for seed in range(1, 6)},
    }
    found = points(outcomes, plan.varied, ["model"])
    assert [point.choice for point in found] == [(("learning_rate", rate),) for rate in (1.0, 2.0, 3.0, 4.0)]
    # Of rate 2 the two good seeds are better than all of rate 1, but most have failed.
    assert [point.median("accuracy") for point in found[:3]] == [pytest.approx(0.13), None, None]
    assert picked(found) == [found[0]] and found[0].best is outcomes[4 * 4]
    text, of_points, of_runs = tables(plan, outcomes)
    assert f"|  | classification, accuracy |\n| --- | --- |\n| {tmp_path}/model | 13.0 |" in text
    assert "| learning_rate 1.0 | accuracy | 13.00 | 11.00 | 15.00 | 5 | 0 |" in text
    for run in outcomes:
        assert (f"- {run.run.name}: {run.failure}" in text) == bool(run.failure)
    rows = list(csv.DictReader(io.StringIO(of_points)))
    assert [(row["learning_rate"], row["failed"], row["picked"]) for row in rows if row["score"] == "mcc"] == [
        ("1.0", "0", "True"), ("2.0", "3", "False"), ("3.0", "5", "False"),
    ]  # fmt: skip
    assert len(list(csv.DictReader(io.StringIO(of_runs)))) == 20


def test_a_run_that_ended_early_is_tried_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--learning_rate", "4", "--seed", "1")
    outcomes = [sweep(tmp_path, plan)[0] for _ in range(2)]
    assert [one.failure for one in outcomes] == ["exit code 1: out of memory"] * 2
    assert f"| {tmp_path}/model | failed |\n" in tables(plan, outcomes[:1])[0]
    assert calls(tmp_path) == ["4.0 1"] * 2


@pytest.mark.parametrize(
    ("file", "content"), [("metrics.json", ""), ("metrics.json", "{}"), ("predictions.jsonl", "{")]
)
def test_a_finished_run_whose_files_are_damaged_is_named(tmp_path: Path, file: str, content: str) -> None:
    plan = plan_of(tmp_path, "--learning_rate", "1", "--seed", "1")
    sweep(tmp_path, plan)
    folder = tmp_path / "out" / "runs" / plan.runs[0].name
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=f"{folder}: damaged .*; remove it, and the run is done again"):
        sweep(tmp_path, plan)


def test_a_mistake_in_options_ends_the_sweep(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--learning_rate", "4", "1", "5", "2", "--seed", "1", "3")
    heard: list[Outcome] = []
    with pytest.raises(UserError, match=r"log.txt: error: --train_file: no such file"):
        Runner(tmp_path / "out" / "runs", [SLOT], False, FAKE).outcomes(plan.runs, heard.append)
    # What has ended is heard of, though the sweep fails.
    assert len(calls(tmp_path)) < 8
    assert sorted(f"{one.run.values['learning_rate']} {one.run.values['seed']}" for one in heard) == [
        call for call in calls(tmp_path) if not call.startswith("5.0")
    ]


def test_a_run_that_is_refused_late_leaves_the_results_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metro_megatron.finetune.sweep.running.Runner", partial(Runner, command=FAKE))
    monkeypatch.setattr(sweep_command, "refuse_mistakes", lambda plan: None)
    plan = plan_of(tmp_path, "--seed", "1", "--learning_rate", "1")
    output = tmp_path / "out"
    (output / "leaderboard" / "7").mkdir(parents=True)
    (output / "flops.png").touch()
    kept = [*plan.runs[0].argv, "--output", str(output), "--keep_models"]
    argv = list(kept[:-1])
    argv.insert(argv.index("--learning_rate") + 2, "5")
    assert exit_code(lambda: call_with_options(sweep_command.main, argv)) == 2
    assert "--train_file: no such file" in capsys.readouterr().err
    assert "| learning_rate 1.0 | accuracy | 11.00 |" in (output / "table.md").read_text()
    # Files of an earlier sweep do not stay.
    assert not (output / "leaderboard").exists() and not (output / "flops.png").exists()
    assert exit_code(lambda: call_with_options(sweep_command.main, kept)) == 0
    assert "note: 1 of the finished runs have kept no model" in capsys.readouterr().out


def test_tags_are_answers_of_their_own() -> None:
    lines = [{"tokens": ["a"] * size, "label": ["O", "B-X"][:size], "prediction": ["O"] * size} for size in (1, 2)]
    assert one_answer(lines) == 'every word got the answer "O"'
    lines[0]["prediction"] = ["B-X"]
    assert one_answer(lines) == ""


def test_models_are_kept_where_asked_for(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--learning_rate", "1", "--seed", "1")
    sweep(tmp_path, plan, keep_models=True)
    (folder,) = tmp_path.glob("out/runs/*")
    assert {path.name for path in (folder / "model").iterdir()} == {
        "metrics.json", "model.safetensors", "predictions.jsonl",
    }  # fmt: skip


def test_tasks_at_once_are_a_row_in_the_column_of_the_first(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--task", "mnli", "mnli_plus", "--learning_rate", "1", "--seed", "1", "2")
    found = points(sweep(tmp_path, plan), plan.varied, ["model"])
    model = ("model", f"{tmp_path}/model")
    assert [(point.row, point.task) for point in found] == [
        ((model,), "mnli"),
        ((model, ("task", "mnli_plus")), "mnli"),
    ]
    assert [point.median("accuracy") for point in found] == [pytest.approx(0.115)] * 2


def test_slots_share_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert slots(3, ["4", "5"], 8) == [{"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("4", "5", "4")]
    assert slots(4, [], 2) == [{"OMP_NUM_THREADS": "1"}] * 4
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert slots(1, [], 2) == [{"OMP_NUM_THREADS": "7"}]
