"""Which steps are run, skipped, continued and done again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metro_megatron.errors import UserError
from tools.demo.clock import Clock, Stage
from tools.demo.journal import Journal, Step, content_hash
from tools.demo.runner import Runner
from tools.demo.stages import build_stages, preset

ROOT = Path(__file__).parents[2]


def shell(name: str, command: str, inputs: tuple[str, ...], outputs: tuple[str, ...], **flags: bool) -> Step:
    paths = (tuple(map(Path, names)) for names in (inputs, outputs))
    return Step(name, ("sh", "-c", command), *paths, **flags)


def chain() -> list[Stage]:
    """text -> upper -> length; every command leaves a mark in calls."""
    steps = [
        shell("upper", "echo upper >> calls; tr a-z A-Z < text > run/upper", ("text",), ("run/upper",)),
        shell("length", "echo length >> calls; wc -c < run/upper > run/length", ("run/upper",), ("run/length",)),
    ]
    return [Stage(step.name, step.name, (step,), 1.0) for step in steps]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "text").write_text("abc")
    return tmp_path


def run(place: Path, stages: list[Stage]) -> list[str]:
    """The marks that one run of the stages leaves."""
    (place / "calls").unlink(missing_ok=True)
    Runner(Journal(place / "run", place), {}).run(stages)
    return (place / "calls").read_text().split() if (place / "calls").exists() else []


def test_a_second_run_does_nothing(place, capsys):
    assert run(place, chain()) == ["upper", "length"]
    assert (place / "run" / "length").read_text().strip() == "3"
    capsys.readouterr()
    assert run(place, chain()) == []
    printed = capsys.readouterr().out
    assert printed.count("done before") == 2 and "[2/2]" in printed
    assert printed.count("about 0:00:00 left") == 2


def test_what_follows_from_a_change_is_done_again_and_nothing_else(place):
    run(place, chain())
    (place / "text").write_text("abcd")
    assert run(place, chain()) == ["upper", "length"]
    (place / "text").write_text("ABCD")  # another input with the same output
    assert run(place, chain()) == ["upper"]
    (place / "run" / "length").unlink()
    assert run(place, chain()) == ["length"]
    changed = chain()
    step = changed[1].steps[0]
    longer = shell("length", "echo again >> calls; cp run/upper run/length", ("run/upper",), ("run/length",))
    assert run(place, [changed[0], Stage("length", "length", (longer,), 1.0)]) == ["again"] and step != longer


def test_a_failed_step_is_reported_and_tried_again(place):
    bad = shell("bad", "echo bad >> calls; echo 'error: no luck'; echo half > run/out; exit 3", ("text",), ("run/out",))
    stages = [*chain()[:1], Stage("bad", "bad", (bad,), 1.0)]
    with pytest.raises(UserError) as caught:
        run(place, stages)
    assert caught.value.problems[0] == "no luck" and "exit code 3" in caught.value.problems[1]
    assert (place / "run" / "logs" / "bad.log").read_text() == "error: no luck\n"
    with pytest.raises(UserError):
        run(place, stages)
    assert (place / "calls").read_text().split() == ["bad"]


def test_half_outputs_go_unless_the_step_continues_from_them(place):
    def stages(resumes: bool) -> list[Stage]:
        step = shell(
            "grow", "mkdir -p run/grown; echo x >> run/grown/x; test -e allowed", (), ("run/grown",), resumes=resumes
        )
        return [Stage("grow", "grow", (step,), 1.0)]

    for resumes, expected in ((True, 2), (False, 1)):
        (place / "allowed").unlink(missing_ok=True)
        with pytest.raises(UserError):
            run(place, stages(resumes))
        (place / "allowed").touch()
        run(place, stages(resumes))
        assert len((place / "run" / "grown" / "x").read_text()) == 2 * expected
        (place / "run" / ".stages" / "grow.json").unlink()


def test_outputs_of_another_command_are_not_continued(place):
    first = shell("grow", "mkdir -p run/grown; echo x >> run/grown/x; exit 1", (), ("run/grown",), resumes=True)
    with pytest.raises(UserError):
        run(place, [Stage("grow", "grow", (first,), 1.0)])
    other = shell("grow", "mkdir -p run/grown; echo y >> run/grown/x", (), ("run/grown",), resumes=True)
    run(place, [Stage("grow", "grow", (other,), 1.0)])
    assert (place / "run" / "grown" / "x").read_text() == "y\n"


def test_steps_of_a_stage_run_beside_each_other_and_keep_what_is_done(place):
    wait = "while ! test -e run/{other}; do sleep 0.02; done"
    pair = [
        shell(name, f"echo {name} >> calls; touch run/{name}; {wait.format(other=other)}", (), (f"run/{name}",))
        for name, other in (("a", "b"), ("b", "a"))
    ]
    assert sorted(run(place, [Stage("pair", "pair", tuple(pair), 1.0, at_a_time=2)])) == ["a", "b"]
    third = shell("c", "echo c >> calls; touch run/c", (), ("run/c",))
    assert run(place, [Stage("pair", "pair", (*pair, third), 1.0, at_a_time=2)]) == ["c"]


def test_always_runs_again_and_a_missing_output_is_an_error(place):
    step = shell("talk", "echo talk >> calls; touch run/x", (), ("run/x",), always=True)
    for _ in range(2):
        assert run(place, [Stage("talk", "talk", (step,), 1.0)]) == ["talk"]
    lazy = shell("lazy", "true", (), ("run/never",))
    with pytest.raises(UserError, match="has not written run/never"):
        run(place, [Stage("lazy", "lazy", (lazy,), 1.0)])


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not the demonstration's"):
        Journal(tmp_path, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        Journal(tmp_path / "thesis.tex", tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_seconds_add_up_over_attempts(tmp_path):
    journal = Journal(tmp_path / "run", tmp_path)
    for seconds, is_fresh, expected in ((2.0, True, 2.0), (3.0, False, 5.0), (1.0, True, 1.0)):
        journal.add_seconds("pretraining", seconds, is_fresh)
        assert journal.seconds() == {"pretraining": expected}


def test_content_hash_is_of_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = content_hash(tmp_path)
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "m.pyc").write_text("2")
    assert content_hash(tmp_path) == first
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert content_hash(tmp_path) != first


def test_the_clock_says_where_we_are():
    stages = [Stage(name, name, (), 100.0) for name in ("one", "two")]
    clock = Clock(stages, started=time.monotonic() - 260.0)
    clock.begin(1)
    clock.expected_done = 100.0
    clock.stage_started -= 60.0  # the first took 200 seconds, half of the second 60
    assert clock.line(0.5) == "[2/2] two | 0:04:20 passed, about 0:01:00 left"


INTERRUPTED = """
import sys
from pathlib import Path
from metro_megatron.cli.command_line import exit_code
from tools.demo.clock import Stage
from tools.demo.journal import Journal, Step
from tools.demo.runner import Runner
place = Path(sys.argv[1])
command = "trap 'echo saved > run/saved; exit 0' TERM; touch run/started; while :; do sleep 0.05; done"
step = Step("long", ("sh", "-c", command), (), (Path("run/started"),), resumes=True)
sys.exit(exit_code(lambda: Runner(Journal(place / "run", place), {}).run([Stage("long", "long", (step,), 1.0)])))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_command_save(tmp_path, number):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, script, tmp_path], env=environment, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (tmp_path / "run" / "saved").read_text() == "saved\n"
    assert b"saves its state" in output


@pytest.mark.parametrize(("name", "gpus", "cores"), [("demo", 0, 2), ("learn", 1, 16), ("learn", 0, 4)])
def test_every_stage_reads_only_what_an_earlier_one_wrote(name, gpus, cores):
    chosen = preset(name, gpus, cores)
    stages = build_stages(chosen, Path("runs/x"), ROOT)
    assert len(stages) == 8
    written: list[Path] = []
    for stage in stages:
        for step in stage.steps:
            ours = [path for path in step.inputs if path.is_relative_to("runs/x")]
            assert all(any(path.is_relative_to(one) for one in written) for path in ours), step.name
            assert all((ROOT / path).exists() for path in step.inputs if path not in ours), step.name
        written += [path for step in stage.steps for path in step.outputs]
    names = [step.name for stage in stages for step in stage.steps]
    assert len(set(names)) == len(names) and len(set(written)) == len(written)
    train = next(step for stage in stages for step in stage.steps if step.name == "pretraining")
    assert train.resumes and str(chosen.processes) in train.command
