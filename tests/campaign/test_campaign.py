"""The campaign's runs are equal in FLOPs and random numbers; each is done once, and its row written once."""

import importlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from metro_megatron.cli.command_line import call_with_options
from metro_megatron.cli.options import flatten
from metro_megatron.commands.compare_runs import read_arm
from metro_megatron.config.file import parse_config
from metro_megatron.config.problems import problems
from metro_megatron.errors import UserError
from metro_megatron.evaluate.scores import Score, write_scores
from metro_megatron.plan.flops import Amount, model_flops
from tests.demo.test_stages import silent
from tools.campaign.arms import ARMS, PlannedRun, Text, planned_runs, step_flops
from tools.campaign.campaign import Options, campaign, check_arms, check_rates, with_budget
from tools.campaign.commands import Commands
from tools.campaign.rows import COLUMNS, keep_tasks, put_row, read_baselines, read_rows, scores_beside

BUDGET = 1e12
TEXT = Text("reviews", "held_out", np.array([64, 64, 64, 23]), "0" * 64)


def test_runs_have_equal_flops_and_differ_in_the_arm_alone():
    runs = planned_runs(TEXT, BUDGET, 4, [1e-3])
    assert [(run.arm, run.config.train.seed) for run in runs] == [
        (arm.name, seed) for seed in (1, 2, 3, 4) for arm in ARMS if arm.most_seeds is None or seed <= 3
    ]
    for run in runs:
        samples = run.config.train.train_steps * run.config.train.global_batch_size
        amount = Amount(samples * 215 / 4, samples * (3 * 64**2 + 23**2) / 4, samples)
        if run.is_trained:
            assert run.flops == pytest.approx(model_flops(run.config, amount))
            assert run.flops == pytest.approx(BUDGET, rel=0.02)
        else:
            assert (run.arm, run.flops) == ("random_weights", 0.0)
    for run in runs[1 : len(ARMS) - 1]:
        ours, metro = flatten(run.config), flatten(runs[0].config)
        changed = {name for name in ours if ours[name] != metro[name]}
        assert {name for name in changed if name.startswith(("data.", "optimizer.", "train.", "checkpoint."))} <= {
            "train.train_steps",
            "optimizer.lr_warmup_steps",
        }
        assert run.config.model.main == runs[0].config.model.main
        assert run.config.objective.rtd_weight == 10


def validated(run: PlannedRun, wanted: dict[str, float]) -> dict[str, str]:
    """A row whose validation figure is the arm's best at the wanted rate; what its test says must not be asked."""
    is_best, is_loss = run.config.optimizer.lr == wanted.get(run.arm), run.arm.startswith("mlm")
    return {"run": run.name, "arm": run.arm, "validation": str(0.7 if is_best != is_loss else 0.6)}


def test_seed_1_tries_every_rate_and_chooses_each_arm_s_own():
    rates = [1e-3, 5e-4, 2e-3]
    before = planned_runs(TEXT, BUDGET, 2, rates)
    first, trained = [run for run in before if run.config.train.seed == 1], [arm for arm in ARMS if arm.is_trained]
    assert len(first) == len(rates) * len(trained) + 1 and before[: len(first)] == first
    wanted = {arm.name: rates[number % 3] for number, arm in enumerate(trained)}
    rows, done = [], set()
    # The run of an arm may depend on what another has chosen.
    for arms in ([arm.name for arm in ARMS if arm.name != "fast_electra"], ["fast_electra"]):
        left = [one for one in planned_runs(TEXT, BUDGET, 2, rates, rows) if one.config.train.seed == 1]
        left = [one for one in left if one.arm in arms]
        assert not done.intersection(one.name for one in left)
        done.update(one.name for one in left)
        rows += [validated(one, wanted) for one in left]
    assert len(done) == len(first)
    after = planned_runs(TEXT, BUDGET, 2, rates, rows)
    second = [run for run in after if run.config.train.seed == 2]
    assert {run.arm: run.config.optimizer.lr for run in second if run.is_trained} == wanted
    names = {(run.arm, run.config.train.seed, run.config.optimizer.lr): run.name for run in after}
    for run in after:
        own = names["metro", run.config.train.seed, wanted["metro"]] if run.arm == "fast_electra" else ""
        assert run.auxiliary == own


def test_what_is_compared_is_one_run_of_each_seed():
    def chosen(seeds, rows=()):
        runs = [run for run in planned_runs(TEXT, BUDGET, seeds, [1e-3, 5e-4], rows) if run.arm == "metro"]
        return [(run.config.train.seed, run.config.optimizer.lr) for run in runs if run.is_chosen]

    grid = [run for run in planned_runs(TEXT, BUDGET, 1, [1e-3, 5e-4]) if run.arm == "metro"]
    rows = [validated(run, {"metro": 5e-4}) for run in grid]
    assert chosen(3, rows) == [(seed, 5e-4) for seed in (1, 2, 3)] and chosen(1, rows) == [(1, 5e-4)]
    assert chosen(1) == [], "as long as a try has no row"


def test_another_run_has_another_name_and_layout_makes_none():
    run, *others = planned_runs(TEXT, BUDGET, 1, [1e-3])
    fast = next(one for one in others if one.auxiliary)
    others.append(replace(fast, auxiliary="another"))
    others += planned_runs(TEXT, 2 * BUDGET, 1, [1e-3])[:1] + planned_runs(TEXT, BUDGET, 1, [2e-3])[:1]
    others.append(replace(run, text=replace(TEXT, sha256="1" * 64)))
    assert len({run.name, *(other.name for other in others)}) == 1 + len(others)
    moved = replace(run, options=(*run.options, "--data.micro_batch_tokens", "1024", "--train.output", "elsewhere"))
    assert moved.name == run.name


class Stages:
    """Stands for the commands: checks that their tools accept them, and leaves what the campaign reads."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails = ""

    def end(self) -> None:
        self.calls.append("end")

    def __call__(self, command: Sequence[str], log: Path | None = None) -> None:
        script = next(word for word in command if word.endswith(".py"))
        words = list(command[command.index(script) + 1 :])
        name = Path(script).stem
        self.calls.append(name)
        if name == "pretrain_metro":
            config = parse_config(words)
            assert problems(config, int(command[command.index("--nproc-per-node") + 1])) == []
            run, steps = Path(config.train.output), config.train.train_steps
            if self.fails == name:  # saved at SIGTERM
                steps = 7
            (run / f"iter_{steps:07d}").mkdir(parents=True)
            (run / "latest_checkpointed_iteration.txt").write_text(str(steps))
            line = {"step": steps, "consumed_tokens": 100 * steps, "tokens_per_second": 50.0}
            (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            (run / "run_config.yaml").write_text(f"train: {{seed: {config.train.seed}}}")
            return
        call_with_options(silent(importlib.import_module(f"metro_megatron.commands.{name}").main), words)
        if self.fails == name:
            raise UserError(f"{name} fails")
        output = Path(words[words.index("--output") + 1])
        if name == "evaluate":
            figures = {"mlm_loss": 5.0, "rtd_auc": 0.7, "unigram_loss": 6.7, "num_tokens": 9}
            if output.stem == "validation":
                figures |= {"mlm_loss": 4.0, "rtd_auc": 0.6}
            output.write_text(json.dumps(figures))
        if name == "probe":
            output.mkdir(parents=True)
            (output / "probe.json").write_text(json.dumps({"tasks": {"cloze": {"score": 0.3}}}))
            write_scores(output / "items.jsonl", [Score("cloze", "1", 1.0)])


DONE = ["pretrain_metro", "convert_checkpoint", "evaluate", "evaluate", "probe"]


def test_a_campaign_goes_on_where_it_was_and_does_nothing_twice(tmp_path, capsys):
    results = str(tmp_path / "results" / "campaign.csv")
    options = Options(BUDGET, root=str(tmp_path), results=results, seeds=1, rates=[1e-3])
    runs, stages, results = planned_runs(TEXT, BUDGET, 1, [1e-3]), Stages(), Path(options.results)
    for stage, calls in (
        ("pretrain_metro", DONE[:1]),
        ("convert_checkpoint", DONE[:2]),
        ("evaluate", DONE[1:3]),
        ("probe", DONE[1:]),
    ):
        stages.calls, stages.fails = [], stage
        with pytest.raises(UserError):
            campaign(options, TEXT, stages)
        assert stages.calls == [*calls, "end"] and read_rows(results) == []
    stages.calls, stages.fails = [], ""
    campaign(options, TEXT, stages)
    assert stages.calls == [*DONE[1:], *DONE * (len(ARMS) - 1)]
    assert f"[2/{len(ARMS)}] electra-1-" in capsys.readouterr().out
    rows, before = read_rows(results), results.read_bytes()
    assert [(row["run"], row["arm"], row["mlm_loss"], row["cloze"], row["rtd_loss"]) for row in rows] == [
        (run.name, run.arm, "5.0", "0.3", "") for run in runs
    ]
    assert [row["validation"] for row in rows] == ["4.0" if run.arm.startswith("mlm") else "0.6" for run in runs]
    assert read_arm([f"{options.root}/{runs[0].name}"])[1]["cloze"] == {"1": 1.0}
    # What is committed is enough for it, too, and says nothing of the machine.
    kept = [scores_beside(results) / run.name for run in runs]
    assert all(read_arm([str(one)]) == {1: {"cloze": {"1": 1.0}}} for one in kept)
    assert all(str(tmp_path) not in file.read_text() for one in kept for file in one.glob("*.yaml"))
    assert [(int(row["tokens"]), float(row["seconds"])) for row in rows] == [
        (100 * run.config.train.train_steps, 2.0 * run.config.train.train_steps) if run.is_trained else (0, 0.0)
        for run in runs
    ]
    stages.calls = []
    campaign(options, TEXT, stages)
    assert stages.calls == [] and results.read_bytes() == before


def test_runs_go_on_beside_each_other_and_wait_for_what_they_depend_on(tmp_path):
    rates, results = [1e-3, 5e-4], tmp_path / "campaign.csv"
    options = Options(BUDGET, root=str(tmp_path), results=str(results), seeds=2, rates=rates, jobs=3)
    options = replace(options, arms=["metro", "fast_electra"])
    together = Barrier(2)  # of the two rates of METRO's first seed; all else waits for them
    known: dict[str, list[str]] = {}

    class Beside(Stages):
        def __call__(self, command: Sequence[str], log: Path | None = None) -> None:
            assert log is not None
            if "pretrain_metro.py" in command:
                known[log.parent.name] = [row["run"] for row in read_rows(results)]
                if log.parent.name.startswith("metro-1"):
                    together.wait(60)
            super().__call__(command, log)

    campaign(options, TEXT, Beside())
    rows = read_rows(results)
    runs = planned_runs(TEXT, BUDGET, 2, rates, rows)
    assert {row["run"] for row in rows} == {run.name for run in runs if run.arm in options.arms} == set(known)
    assert len(known) == 6
    assert all(run.waits_for <= set(known[run.name]) for run in runs if run.name in known)
    assert all(run.auxiliary in known[run.name] for run in runs if run.arm == "fast_electra")


class Trained(Stages):
    """Notes which runs are pretrained."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[str] = []

    def __call__(self, command: Sequence[str], log: Path | None = None) -> None:
        if "pretrain_metro.py" in command:
            self.runs.append(Path(command[command.index("--train.output") + 1]).parent.name)
        super().__call__(command, log)


def test_another_machine_does_again_what_the_table_does_not_bring(tmp_path):
    results, rates = tmp_path / "campaign.csv", [1e-3, 5e-4]
    options = Options(BUDGET, root=str(tmp_path / "here"), results=str(results), seeds=2, rates=rates, jobs=2)
    options = replace(options, arms=["metro"])
    campaign(options, TEXT, Stages())
    before = read_rows(results)
    names = {(row["seed"], row["lr"]): row["run"] for row in before}
    first, other, second = names["1", "0.001"], names["1", "0.0005"], names["2", "0.001"]
    for run in (first, other):  # a try of another rate needs none
        shutil.rmtree(scores_beside(results) / run)
    row = next(row for row in before if row["run"] == first)
    put_row(results, {**row, "date": "long ago", "validation": "0.01"})
    assert {**row, "date": "long ago"} in read_rows(results), "what chose the rate stays"
    options = replace(options, root=str(tmp_path / "there"))
    campaign(options, TEXT, there := Trained())
    assert there.runs == [first] and read_rows(results) == before, "its row is replaced where it stands"
    # The frozen auxiliary is a model, which no table has.
    options = replace(options, arms=["metro", "fast_electra"])
    campaign(options, TEXT, there := Trained())
    assert sorted(name.rpartition("-")[0] for name in there.runs) == [
        *["fast_electra-1"] * 2,
        "fast_electra-2",
        "metro-2",
    ]
    assert there.runs.index(second) < there.runs.index(
        next(run for run in there.runs if run.startswith("fast_electra-2"))
    )
    assert read_rows(results)[: len(before)] == before
    shutil.rmtree(tmp_path / "there")
    campaign(options, TEXT, there := Trained())
    assert there.runs == [], "no run takes it any more"


def test_commands_end_together_and_say_where_their_output_is(tmp_path):
    commands, log = Commands(), tmp_path / "run" / "output.txt"
    commands(["sh", "-c", "echo out; echo err >&2"], log)
    with pytest.raises(UserError, match=rf"exit code 3 of: sh -c 'exit 3' \(see {log}\)"):
        commands(["sh", "-c", "exit 3"], log)
    assert log.read_text() == "out\nerr\n"
    with ThreadPoolExecutor(2) as threads:
        saves = ["sh", "-c", "trap 'echo saved; exit 1' TERM; echo begun; while :; do sleep 0.05; done"]
        both = [threads.submit(commands, saves, tmp_path / name) for name in "ab"]
        while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "ab"):
            time.sleep(0.01)
        commands.end()
        assert all("exit code 1" in str(one.exception()) for one in both)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["begun\nsaved\n"] * 2
    with pytest.raises(UserError, match="run the same command again"):
        commands(["true"])


def test_minutes_are_flops_by_the_pace_of_the_first_steps_which_are_timed_once(tmp_path):
    options, stages = Options(minutes=3, root=str(tmp_path), rates=[1e-3], arms=["metro"]), Stages()
    budget = with_budget(options, TEXT, stages).budget
    # As the stage says: 50 tokens a second, 100 a step.
    assert budget == pytest.approx(3 * 60 / 2 * step_flops("metro", TEXT), rel=0.05) and len(stages.calls) == 1
    assert with_budget(replace(options, minutes=6), TEXT, stages).budget == pytest.approx(2 * budget, rel=0.05)
    assert len(stages.calls) == 1


def test_some_arms_are_done_first_and_their_runs_are_the_same(tmp_path):
    results = tmp_path / "campaign.csv"
    options = Options(BUDGET, root=str(tmp_path), results=str(results), seeds=2, rates=[1e-3], arms=["metro", "mlm_15"])
    campaign(options, TEXT, Stages())
    wanted = [run.name for run in planned_runs(TEXT, BUDGET, 2, [1e-3]) if run.arm in options.arms]
    assert [row["run"] for row in read_rows(results)] == wanted and len(wanted) == 4
    with pytest.raises(UserError) as caught:
        check_arms(["electra", "mlm", "fast_electra"])
    assert caught.value.problems == [
        f"--arms mlm: unknown; there are {', '.join(arm.name for arm in ARMS)}",
        "--arms fast_electra: its auxiliary is that of metro; give metro, too",
    ]


def test_rates_are_those_that_a_run_can_have():
    check_rates([1e-3, 5e-4])
    for rates, expected in (
        ([0.0, 1e-3, -1e-3], [f"--rates: lr is {rate}, must be greater than 0" for rate in (0.0, -0.001)]),
        (
            [math.inf, math.nan],
            [f"--rates: lr is {rate}, must be finite and greater than 0" for rate in ["inf", "nan"]],
        ),
        ([1e-3, 2e-3, 0.00100000001], ["--rates 0.001: given twice"]),
        ([], ["--rates: give one, or several to choose from"]),
    ):
        with pytest.raises(UserError) as caught:
            check_rates(rates)
        assert caught.value.problems == expected


def test_rows_of_one_table_are_of_the_same_tasks(tmp_path):
    results, manifest = tmp_path / "results" / "campaign.csv", tmp_path / "tasks" / "manifest.json"
    manifest.parent.mkdir()

    def write(sha256, tfidf):
        facts = {"sha256": {"train": sha256, "test": sha256}, "baselines": {"trivial": 0.25, "tfidf": tfidf}}
        manifest.write_text(json.dumps({"tasks": {"cloze": facts}}))

    for sha256 in ("0", "1"):  # there are no rows yet
        write(sha256, 0.3)
        keep_tasks(manifest, results)
    put_row(results, {"run": "metro-1"})
    write("1", 0.4)
    keep_tasks(manifest, results)
    assert read_baselines(results) == {"cloze": {"trivial": 0.25, "tfidf": 0.4}}
    write("2", 0.4)
    with pytest.raises(UserError, match="has rows of other tasks"):
        keep_tasks(manifest, results)


def test_the_committed_table_has_the_columns_and_no_run_twice():
    path = Path(__file__).parents[2] / "docs" / "results" / "campaign.csv"
    assert path.read_text(encoding="utf-8").splitlines()[0] == ",".join(COLUMNS)
    names = [row["run"] for row in read_rows(path)]
    assert len(names) == len(set(names))
