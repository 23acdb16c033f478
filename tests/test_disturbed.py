"""What happens to a run from outside: its launcher dies, its terminal goes, somebody starts it a second time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from metro_megatron.checkpoint.files import tracked_step
from metro_megatron.errors import UserError
from metro_megatron.train.processes import NEW_STORE, claimed, refuse_used_store
from tests.test_pretrain_metro import command, corpus, environment, lines, run, yaml_file  # noqa: F401 - fixtures

LONG = (
    *("--train.train_steps", "100000", "--train.log_interval", "1"),
    *("--checkpoint.save_interval", "100000", "--parallel.timeout_minutes", "1"),
)


def wait_for(condition: Callable[[], object], seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def started(yaml_file: Path, corpus: Path, tmp_path: Path):  # noqa: F811
    """A run of two processes under torchrun and nohup that has trained: folder, torchrun, its processes, console."""
    output, console = tmp_path / "run", tmp_path / "console"
    words = command(yaml_file, corpus, output, *LONG, processes=2)
    with console.open("w") as file:
        torchrun = subprocess.Popen(["nohup", *words], env=environment(), stdout=file, stderr=file)
    workers: list[psutil.Process] = []
    try:
        wait_for(lambda: (output / "metrics.jsonl").exists() and (output / "metrics.jsonl").read_text())
        workers = psutil.Process(torchrun.pid).children(recursive=True)
        yield output, torchrun, workers, console
    finally:
        for process in (torchrun, *workers):
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
        torchrun.wait()


def test_a_second_command_is_refused_and_processes_whose_torchrun_is_killed_save_and_end(
    started: tuple[Path, subprocess.Popen[bytes], list[psutil.Process], Path],
    yaml_file: Path,  # noqa: F811
    corpus: Path,  # noqa: F811
) -> None:
    output, torchrun, workers, console = started
    second = run(yaml_file, corpus, output, *LONG)
    assert second.returncode == 2 and second.stderr.count("error: ") == 1
    assert f"{output}: process {workers[0].pid} on" in second.stderr and "trains in it" in second.stderr
    torchrun.kill()
    torchrun.wait()
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))
    done = tracked_step(output)
    assert done is not None and lines(output)[-1]["step"] == done, "every step is logged, the last ones too"
    assert "SIGTERM: saving after this step" in console.read_text()
    with claimed(output):  # the other claim has ended with its process
        pass


@pytest.mark.long
def test_a_terminal_that_goes_loses_nothing_under_nohup(
    started: tuple[Path, subprocess.Popen[bytes], list[psutil.Process], Path],
) -> None:
    """torchrun hears SIGHUP although nohup ignores it, and passes it on to its processes."""
    output, torchrun, _, console = started
    torchrun.send_signal(signal.SIGHUP)
    torchrun.wait(timeout=60)
    done = tracked_step(output)
    assert done is not None and lines(output)[-1]["step"] == done
    assert "SIGHUP: saving after this step" in console.read_text()
    assert not os.path.exists(output / f"iter_{done:07d}.unfinished")


@pytest.mark.long
def test_a_rank_that_is_stopped_is_named_within_the_time_that_ranks_wait(
    started: tuple[Path, subprocess.Popen[bytes], list[psutil.Process], Path],
) -> None:
    output, torchrun, workers, console = started
    workers[1].suspend()
    torchrun.wait(timeout=180)  # one minute, and half of one in which torchrun is patient with a stopped process
    said = console.read_text()
    assert f"rank 1, process {workers[1].pid} on" in said and "has done nothing since" in said
    assert "File" in (output / "still" / "rank_0.txt").read_text()


def test_a_start_that_could_not_find_its_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    refuse_used_store()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    with pytest.raises(UserError, match=f"export {NEW_STORE}=1"):
        refuse_used_store()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    refuse_used_store()


@pytest.mark.long
def test_torchrun_starts_the_ranks_again_when_one_is_killed_and_they_go_on(
    yaml_file: Path,  # noqa: F811
    corpus: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    output, console = tmp_path / "run", tmp_path / "console"
    options = ("--train.train_steps", "60", "--checkpoint.save_interval", "10", "--train.log_interval", "1")
    words = command(yaml_file, corpus, output, *options, processes=2)
    # Once would be enough, but for a port that another program has taken since torchrun chose it.
    words[3:3] = ["--max-restarts", "3"]
    own = environment() | {NEW_STORE: "1"}
    with console.open("w") as file, subprocess.Popen(words, env=own, stdout=file, stderr=file) as torchrun:
        wait_for(lambda: tracked_step(output))
        workers = psutil.Process(torchrun.pid).children(recursive=True)
        max(workers, key=lambda one: one.pid).kill()
        assert torchrun.wait(timeout=200) == 0, console.read_text()
    assert "continuing" in console.read_text() and tracked_step(output) == 60
    assert [line["step"] for line in lines(output) if "consumed_samples" in line] == list(range(1, 61))
