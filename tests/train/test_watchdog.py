"""A rank that stands still, or never comes, is named by the others, which end."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from metro_megatron.config.schema import Config, ParallelConfig, TrainConfig
from metro_megatron.errors import UserError
from metro_megatron.parallel.layout import meet
from metro_megatron.train.watchdog import EXIT_CODE, Watchdog, _key, watched
from tests.distributed import PRELOADED

SECONDS = 2.0


def be_a_rank(rank: int, port: int, behaviour: str, folder: Path) -> None:
    """One of three, which have met, or wait for who has not come."""
    files = os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY)
    os.dup2(files, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3", TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    config = Config(parallel=ParallelConfig(timeout_minutes=SECONDS / 60), train=TrainConfig(output=str(folder)))
    with watched(config) as watchdog:
        assert watchdog
        watchdog.sign("step 7")
        if behaviour == "stops":
            time.sleep(0.3)  # its sign is there
            os.kill(os.getpid(), signal.SIGSTOP)
        elif behaviour == "goes on":
            time.sleep(SECONDS / 2)
            watchdog.sign("step 8")
        wait_in_a_collective()


def wait_in_a_collective() -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("third", "said"),
    [
        ("stops", "rank 2, process "),
        ("waits", "rank 2, process "),
        ("absent", "rank 2 did not come to where all ranks meet"),
    ],
    ids=["stopped whole", "an older sign than others'", "not there"],
)
def test_the_rank_that_others_wait_for_is_named_with_the_stacks_of_who_waits(
    tmp_path: Path, third: str, said: str
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    behaviours = ["goes on" if third == "waits" else "waits"] * 2 + [third] * (third != "absent")
    ranks: list[ForkServerProcess] = [
        context.Process(target=be_a_rank, args=(rank, store.port, behaviour, tmp_path))
        for rank, behaviour in enumerate(behaviours)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks[:2]:
            rank.join(60)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.exitcode for rank in ranks[:2]] == [EXIT_CODE] * 2
    lines = [line for path in sorted(tmp_path.glob("*.err")) for line in path.read_text().splitlines()]
    assert lines and len(set(lines)) == 1, "all say what the first has found"
    assert said in lines[0] and "timeout_minutes" in lines[0]
    assert third == "absent" or "when it began step 7" in lines[0]
    for rank in range(2):
        assert "wait_in_a_collective" in (tmp_path / "still" / f"rank_{rank}.txt").read_text()


def test_what_a_rank_begins_is_told_at_once(tmp_path: Path) -> None:
    store = HashStore()
    watchdog = Watchdog(store, 0, 2, 10_000.0, tmp_path)  # looks every 500 s

    def told(what: str) -> bool:
        return store.check([_key(0)]) and json.loads(store.get(_key(0)))[2] == what

    for doing in ("step 1", "to save"):
        watchdog.sign(doing)
        deadline = time.monotonic() + 60
        while not told(doing) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert told(doing)
    begun = time.monotonic()
    watchdog.close()
    assert time.monotonic() - begun < 60


def test_a_store_that_nobody_opens_is_rank_0s_to_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"rank 0 does not answer at 127.0.0.1:1 for 0.01 minutes"):
        meet(0.01)


def test_a_port_that_another_program_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        for name, value in {**address, "RANK": "0", "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"rank 0 cannot listen at 127.0.0.1:\d+.*another --master-port"):
            meet(0.01)
