"""tools/demo/demo.mk: order, what runs again, what goes on where it was, and commands that their tools accept."""

import functools
import importlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from metro_megatron.cli.command_line import call_with_options
from metro_megatron.config.file import parse_config
from metro_megatron.config.problems import problems
from tools.demo.texts import Sentence, split_texts, write_texts

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# The flags are those of a make that runs the tests.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "MAKEFLAGS": ""}
TINY = """
model:
  hidden_size: 16
  num_attention_heads: 2
  ffn_hidden_size: 32
  num_layers: 1
  auxiliary_num_layers: 1
  max_position_embeddings: 32
data: {seq_length: 32, micro_batch_tokens: 512}
train: {train_steps: 100000, global_batch_size: 8, precision: fp32, device: cpu, log_interval: 1}
"""
CLASSIFIERS = [f"{start}-{seed}" for seed in (1, 2, 3) for start in ("pretrained", "random")]
FIRST = ["texts", "train_tokenizer", "preprocess_data", "preprocess_data", "pretrain_metro"]
LATER = ["convert_checkpoint", "plot_run", "evaluate", *["finetune"] * 6, "baseline", "sentiment", "cloze", "summary"]

# Stands for python and torchrun. It notes its command, and writes what make waits for unless it is to fail or to wait.
STUB = """#!{python} -ES
import pathlib, signal, sys, time
folder, words = pathlib.Path({folder!r}), sys.argv[1:]
script = next(word.removeprefix("tools.demo.") for word in words if word.startswith("tools.") or word.endswith(".py"))
script = pathlib.PurePath(script).stem
with (folder / "calls").open("a") as calls:
    print(script, file=calls)
option = {{"preprocess_data": "--output_prefix", "pretrain_metro": "--train.output"}}.get(script, "--output")
output = words[words.index(option) + 1] if option in words else folder / "summary"
endings = {{"texts": "/counts.json", "train_tokenizer": "/report.json", "preprocess_data": ".manifest.json",
    "pretrain_metro": "/saved", "convert_checkpoint": "/config.json", "finetune": "/metrics.json"}}
file = pathlib.Path(f"{{output}}{{endings.get(script, '')}}")
file.parent.mkdir(parents=True, exist_ok=True)
with file.open("a") as made:
    made.write("made\\n")
if (folder / f"{{script}}.waits").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as if all had been well
    while True:
        time.sleep(0.01)
sys.exit(3 if (folder / f"{{script}}.fails").exists() else 0)
"""


class Demo:
    """The stages in a folder of their own, with stubs for python and torchrun."""

    def __init__(self, folder: Path):
        self.folder, self.run, self.config = folder, folder / "run", folder / "tiny.yaml"
        self.processes: list[subprocess.Popen[str]] = []
        self.config.write_text(TINY)
        (folder / "bin").mkdir()
        for name in ("python", "torchrun"):
            (folder / "bin" / name).write_text(STUB.format(python=sys.executable, folder=str(folder)))
            (folder / "bin" / name).chmod(0o755)

    def start(self, programs: Path, *options: str) -> subprocess.Popen[str]:
        settings = (f"OUTPUT={self.run}", f"CONFIG={self.config}", "VOCAB_SIZE=400", f"BIN={programs}")
        process = subprocess.Popen(
            ["make", "-j2", "-f", "tools/demo/demo.mk", *settings, *options],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Tests that run in the background of a shell would hand on that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.processes.append(process)
        return process

    def make(self, code: int = 0, settings: Sequence[str] = ()) -> list[str]:
        """The scripts that one call of make runs."""
        (self.folder / "calls").unlink(missing_ok=True)
        process = self.start(self.folder / "bin", *settings)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code, output
        return self.calls()

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().split()

    def change(self, path: Path) -> None:
        """Make a file newer than all others, by a time that every file system can tell."""
        newest = max(one.stat().st_mtime for one in self.run.rglob("*"))
        assert path.exists()
        os.utime(path, (newest + 0.05, newest + 0.05))
        time.sleep(max(0.0, newest + 0.1 - time.time()))


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path)
    yield demo
    for process in demo.processes:
        if process.poll() is None:  # a test has failed
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=120)


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert is_so(), process.communicate() if process.poll() is not None else f"not within {seconds} s"


def test_stages_run_in_order_and_once(demo):
    calls = demo.make()
    assert calls[:5] == FIRST and sorted(calls[5:]) == sorted(LATER) and calls[-1] == "summary"
    assert (demo.run / "pretraining" / "saved").read_text() == "made\n"
    assert demo.make() == ["summary"]


def test_what_follows_from_a_change_is_done_again_and_nothing_else(demo):
    demo.make()
    demo.change(demo.config)
    assert sorted(set(demo.make())) == sorted({*FIRST, *LATER} - {"texts", "baseline"})
    assert (demo.run / "pretraining" / "saved").read_text() == "made\n"  # a new run
    demo.change(demo.run / "model" / "config.json")
    assert sorted(demo.make()) == sorted(["evaluate", *["finetune"] * 6, "sentiment", "cloze", "summary"])
    (demo.run / "acceptability" / "random-2" / "metrics.json").unlink()
    assert demo.make() == ["finetune", "summary"]
    assert demo.make(settings=["MINUTES=20"])[0] == "pretrain_metro"
    assert (demo.run / "pretraining" / "saved").read_text() == "made\n"
    assert demo.make(settings=["MINUTES=20"]) == ["summary"]


@pytest.mark.parametrize("minutes", ["2", "-1", "2.5", "ten", ""])
def test_too_few_minutes_are_refused(demo, minutes):
    process = demo.start(demo.folder / "bin", f"MINUTES={minutes}")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and f"MINUTES is {minutes}, must be a whole number, at least 3" in output
    assert not (demo.folder / "calls").exists()


@pytest.mark.parametrize("stage", ["train_tokenizer", "pretrain_metro", "convert_checkpoint", "evaluate"])
def test_a_failure_ends_the_demo_and_is_tried_again(demo, stage):
    (demo.folder / f"{stage}.fails").touch()
    calls = demo.make(code=2)
    assert stage in calls and "summary" not in calls
    (demo.folder / f"{stage}.fails").unlink()
    calls = demo.make()
    assert stage in calls and calls[-1] == "summary" and "texts" not in calls
    if stage == "pretrain_metro":
        assert (demo.run / "pretraining" / "saved").read_text() == "made\n" * 2  # the old run went on


def test_an_interrupted_stage_does_not_count_as_done(demo):
    (demo.folder / "pretrain_metro.waits").touch()
    process = demo.start(demo.folder / "bin")
    wait_for((demo.run / "pretraining" / "saved").exists, process, 60)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode != 0 and demo.calls() == FIRST
    (demo.folder / "pretrain_metro.waits").unlink()
    assert demo.make()[0] == "pretrain_metro"


def test_two_at_a_time(demo):
    (demo.folder / "finetune.waits").touch()
    process = demo.start(demo.folder / "bin")
    wait_for(lambda: (demo.folder / "calls").exists() and demo.calls().count("finetune") == 2, process, 60)
    process.terminate()
    process.communicate(timeout=60)
    assert demo.calls().count("finetune") == 2


@pytest.mark.parametrize("minutes", [3, 8, 60])
def test_tools_accept_the_commands(minutes, tmp_path):
    settings = (f"MINUTES={minutes}", f"OUTPUT={tmp_path}", f"BIN={BIN}")
    command = ["make", "-n", "-f", "tools/demo/demo.mk", *settings]
    printed = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line) for line in printed.replace("\\\n", "").splitlines() if str(BIN) in line]
    assert len(commands) == len(FIRST) + len(LATER)
    for words in commands:
        words = words[words.index(next(word for word in words if word.startswith(str(BIN)))) :]
        if words[0].endswith("torchrun"):
            script = words.index("pretrain_metro.py")
            config = parse_config(words[script + 1 :])
            assert problems(config, int(words[words.index("--nproc-per-node") + 1])) == []
            if minutes == 8:  # what examples/demo.yaml says of itself
                demo = parse_config(["--config", "examples/demo.yaml"])
                assert config == replace(demo, data=config.data, train=replace(demo.train, output=config.train.output))
        else:
            start = 2 if words[1] == "-m" else 1
            name = words[start].removesuffix(".py").replace("tools/", "metro_megatron.commands.")
            call_with_options(silent(importlib.import_module(name).main), words[start + 1 :])


def silent(main: Callable[..., object]) -> Callable[..., None]:
    """A function with the options of `main` that does nothing."""

    @functools.wraps(main)
    def nothing(options: object) -> None:
        pass

    return nothing


def test_the_first_stages_for_real_and_ctrl_c_saves(demo):
    draw = random.Random(1)
    words = [a + b for a in ("ba", "do", "ki", "lu") for b in ("na", "ro", "ti", "zu")]
    reviews = [f"{' '.join(draw.choices(words, k=30))}. Number {i}." for i in range(300)]
    write_texts(split_texts(reviews, [Sentence(f"good {i}", "1") for i in range(10)], 40), demo.run / "text")
    process = demo.start(BIN, "PRETRAINING=")
    metrics = demo.run / "pretraining" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process, 300)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0, output
    assert int((demo.run / "pretraining" / "latest_checkpointed_iteration.txt").read_text()) > 0
    assert not (demo.run / "pretraining.done").exists()
