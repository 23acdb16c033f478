"""The one command for a GPU: stages end in time, are noted, and are not run twice; its page says what was found."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import bench_fused, bench_gpu, bench_learn, bench_train, memory_check, same_losses
from benchmarks.bench_gpu import Options, chosen, gpu_stages, main
from benchmarks.operators import cases
from benchmarks.predictions import STEP, Prediction, beside_predictions, read_predictions
from benchmarks.provenance import ROOT
from benchmarks.stages import Record, Stage, run_stages
from benchmarks.summary import write_summary
from fused.dispatch import OPERATOR_NAMES
from metro_megatron.cli.command_line import call_with_options
from metro_megatron.cli.options import options_of, read_options
from metro_megatron.config.file import parse_config
from metro_megatron.errors import UserError
from metro_megatron.plan.gpus import GPUS

HEAD = {"device": "NVIDIA H200", "commit": "abc", "date": "today", "command": "bench"}


def python(code: str) -> Callable[[float], Sequence[str]]:
    return lambda limit_s: [sys.executable, "-S", "-c", code]


def results(stages: Sequence[Stage], folder: Path, commit: str = "abc", budget_s: float = 100.0) -> dict[str, str]:
    record = Record(folder, {**HEAD, "commit": commit, "date": str(time.time())})
    for _ in run_stages(stages, record, budget_s):
        json.loads((folder / "stages.json").read_text())  # whole after every stage
    return {name: row["result"] for name, row in record.rows.items()}


def test_stages_end_and_are_resumed(tmp_path: Path) -> None:
    count = tmp_path / "count"
    counts = f"open({str(count)!r}, 'a').write('x'); print('7 passed')"
    sleeps = "time.sleep(99)"
    child = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; {sleeps}'])"
    stages = [
        Stage("right", "", python(counts), 60.0),
        Stage("wrong", "", python("import sys; print('a'); sys.exit(3)"), 60.0),
        Stage("hangs", "", python(f"{child}; print(p.pid, flush=True); {sleeps}"), 2.0),
        Stage("absent", "", python("1"), 60.0, "needs a GPU"),
    ]
    folder = tmp_path / "out"
    assert results(stages, folder) == {"right": "passed", "wrong": "failed", "hangs": "stopped", "absent": "skipped"}
    notes = {row["stage"]: row["note"] for row in json.loads((folder / "stages.json").read_text())["stages"]}
    assert notes["right"] == "7 passed" and notes["wrong"] == "exit code 3: a" and "2 s" in notes["hangs"]
    assert not psutil.pid_exists(int((folder / "hangs.log").read_text().split()[0]))
    (folder / "right.csv").write_text("kept")
    assert results(stages[:2], folder)["right"] == "passed" and count.read_text() == "x"
    assert (folder / "right.csv").read_text() == "kept"
    # Another commit, or another command, is another measurement.
    assert results(stages[:1], folder, "def") == {"right": "passed"} and count.read_text() == "xx"
    assert not (folder / "right.csv").exists()
    assert results([Stage("right", "", python("pass"), 60.0)], folder, "def") and count.read_text() == "xx"
    assert results(stages[:1], tmp_path / "late", budget_s=1.0) == {"right": "not run"}


def test_what_failed_is_run_again_after_the_others(tmp_path: Path) -> None:
    mended, log = tmp_path / "mended", tmp_path / "log"
    says = f"import os, sys; open({str(log)!r}, 'a').write(sys.argv[1]); "
    command = [sys.executable, "-S", "-c", says + f"sys.exit(not os.path.exists({str(mended)!r}))"]
    stages = [Stage(name, "", lambda _, name=name: [*command, name], 60.0) for name in "ab"]
    assert results(stages[:1], tmp_path / "out") == {"a": "failed"}
    # Without time nothing of what is known of it is lost.
    assert results(stages, tmp_path / "out", budget_s=1.0) == {"a": "failed", "b": "not run"}
    mended.touch()
    assert results(stages, tmp_path / "out") == {"a": "passed", "b": "passed"} and log.read_text() == "aba"
    assert results(stages, tmp_path / "out") and log.read_text() == "aba"


@pytest.mark.parametrize(
    "code, limit_s, budget_s, wanted",
    [("", 60.0, 60.0, 0), ("exit(3)", 60.0, 60.0, 1), ("while 1: 1", 1.0, 60.0, 1), ("", 60.0, 1.0, 1)],
)
def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, limit_s: float, budget_s: float, wanted: int
) -> None:
    """Also of a stage that hangs, and of one that was not reached."""
    stages = [Stage("one", "", python(code), limit_s), Stage("two", "", python(""), 60.0, "needs a GPU")]
    monkeypatch.setattr(bench_gpu, "gpu_stages", lambda *_: stages)
    folder = tmp_path / "out"
    assert main(Options(output=str(folder), device="cpu", commit="abc", budget_s=budget_s)) == wanted
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert set(archive.getnames()) == {"out", *(f"out/{name}" for name in os.listdir(folder))}


def test_wheels_that_are_missing_are_told(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    script = shutil.copy(ROOT / "benchmarks" / "bare.sh", tmp_path / "benchmarks")
    done = subprocess.run(["sh", script], capture_output=True, text=True)
    assert done.returncode == 2 and "make wheels" in done.stderr and done.stderr.count("\n") == 1


def test_options() -> None:
    stages = gpu_stages(Path("out"), torch.device("cuda"), "abc")
    assert [stage.name for stage in chosen(stages, ["base", "tests"], [])] == ["tests", "base"]
    assert chosen(stages, [], ["tests=7"])[0].limit_s == 7
    with pytest.raises(UserError) as caught:
        chosen(stages, ["speed"], ["tests=a", "x=1"])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["--limits", "--limits", "--stages"]
    with pytest.raises(UserError, match="--output: a trial"):
        main(Options(device="cpu"))
    assert sum(stage.limit_s for stage in stages) <= Options().budget_s


def test_commands_have_options_that_exist() -> None:
    """A misspelled one would be found on the GPU, in time that is lent."""
    tools = {
        "bench_fused": bench_fused,
        "bench_train": bench_train,
        "same_losses": same_losses,
        "bench_learn": bench_learn,
    }
    seen = []
    for stage in gpu_stages(Path("out"), torch.device("cuda"), "abc"):
        words = list(stage.command(stage.limit_s))
        name = words[2].removeprefix("benchmarks.")
        if name not in tools:
            continue
        seen.append(stage.name)
        known = {option.leaf: option for option in options_of(tools[name].Options)}
        given = read_options(words[3:], known, keep_unknown=name == "bench_train")
        assert given.problems == [] and given.values["commit"] == "abc"
        assert given.values["output"] == f"out/{stage.name}"
        parse_config(given.unknown)
    assert seen == ["losses", "operators", "base", "large", "learn", "rivals", "table5"]


def test_predictions_speak_of_what_is_measured() -> None:
    presets = {(case.operator, case.preset) for case in cases()} | {(STEP, "base"), (STEP, "large")}
    for gpu in GPUS.values():
        for one in read_predictions(gpu.devices[0]):
            assert (one.operator, one.preset) in presets and one.low < one.high
            assert one.figure in (*bench_train.COLUMNS, "forward_rate", "backward_rate", "both_percent") or (
                one.operator in OPERATOR_NAMES and one.figure in ("forward_percent", "backward_percent")
            )
    assert len(read_predictions("NVIDIA H200")) == 30 and read_predictions("a stranger") == []
    rows = [
        {"operator": "attention", "preset": "base", "contestant": "ours", "status": "ok", "forward_rate": 120.0},
        {"operator": "attention", "preset": "xl", "contestant": "ours", "status": "failed: x"},
        {"preset": "base", "fused": "all", "status": "ok", "mfu_percent": 30.0},
    ]
    predictions = [
        Prediction("attention", "base", "ours", "forward_rate", 85.0, 110.0, "counted"),
        Prediction("attention", "xl", "ours", "forward_rate", 85.0, 110.0, "counted"),
        Prediction(STEP, "base", "all", "mfu_percent", 24.0, 32.0, "counted"),
    ]
    found = [(row["what"], row["verdict"]) for row in beside_predictions(rows, predictions)]
    assert found == [("attention", "above"), (STEP, "inside")]


def test_the_page(tmp_path: Path) -> None:
    step = {"preset": "base", "fused": "all", "status": "ok", "mfu_percent": 20.0, "seconds_per_step": 0.5}
    kernels = {"largest": [{"percent": 50.0, "ms": 3.0, "count": 7, "name": "a|b"}], "gap_percent": 12.0}
    stage = {"stage": "base", "result": "passed", "seconds": 9.0, "note": "", "what": "", "command": ""}
    contents = {
        "stages": {
            "head": dict.fromkeys(("driver", "torch", "cuda", "triton", "python"), "1") | HEAD,
            "stages": [stage],
        },
        "base": [{"rows": []}, {"rows": [step], "profile": kernels}],
        "losses": [{"rows": [], "verdicts": [{"text": "fp32 aux_loss: equal"}]}],
        "learn": [{"rows": [], "verdicts": [{"text": "metro aux_loss: 8 -> 6"}]}],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    write_summary(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# One GPU: NVIDIA H200\n") and "| commit | abc |" in text
    assert "| step | base | mfu_percent | 26 to 35 | 20 | below | counted |" in text
    assert "fp32 aux_loss: equal" in text and "metro aux_loss: 8 -> 6" in text
    assert "| 50 | 3 | 7 | a/b |" in text and "no kernel ran" in text
    assert "| base | all | 0.5 | 20 | ok |" in text


def on_a_bare_machine(modules: Sequence[str]) -> Sequence[dict[str, float]]:
    """Losses of the first steps, from a machine that has only what the docs and the Makefile's WHEELS list."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.bare", *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    losses: Sequence[dict[str, float]] = json.loads(done.stdout)
    return losses


def test_losses_of_the_first_steps_are_the_reference() -> None:
    wanted = same_losses.read_reference(same_losses.REFERENCE)
    assert len(wanted) == same_losses.STEPS and wanted[-1]["aux_loss"] < wanted[0]["aux_loss"] - 1
    commands = [list(stage.command(60.0)) for stage in gpu_stages(Path("out"), torch.device("cuda"), "abc")]
    stages = {words[words.index("-m") + 1] for words in commands}
    tests = [f"tests.fused.{path.stem}" for path in (ROOT / "tests" / "fused").glob("*.py")]
    got = on_a_bare_machine(["benchmarks.bench_gpu", *stages, "tests.conftest", *tests])
    assert all(one["is_equal"] for one in same_losses.compare("fp32", got, wanted))
    wrong = [{**one, "rtd_loss": one["rtd_loss"] * 1.001} for one in wanted]
    found = same_losses.compare("fp32", wrong, wanted)
    assert [one["loss"] for one in found if not one["is_equal"]] == ["rtd_loss"]
    late = [*wanted[:100], *wrong[100:]]
    assert not all(one["is_equal"] for one in same_losses.compare("fp32", late, wanted))
    lost = [{**one, "clm_loss": float("nan")} for one in wanted]
    assert not all(one["is_equal"] for one in same_losses.compare("bf16", lost, wanted))


def test_the_memory_check_runs_both_operators(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_with_options(memory_check.main, ["--device", "cpu"]) == 0
    assert capsys.readouterr().out == "attention on cpu: right\nlinear_cross_entropy on cpu: right\n"


@pytest.mark.long
def test_a_trial_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--device", "cpu", "--output", "out", "--commit", "abc", "--limits", "losses=250", "operators=250"]
    assert call_with_options(main, options) == 0
    record = json.loads(Path("out/stages.json").read_text())
    passed = [row["stage"] for row in record["stages"] if row["result"] == "passed"]
    assert passed == ["losses", "operators", "learn"]
    assert "## Losses beside the CPU's" in Path("out/summary.md").read_text()
    assert {"losses.csv", "operators.csv", "losses.log"} <= set(os.listdir("out"))
