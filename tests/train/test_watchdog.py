"""A rank that stands still is named by the others, which end."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from metro_megatron.train.watchdog import EXIT_CODE
from tests.distributed import run_program

WAITING = """
import os, signal, sys, time
from pathlib import Path
from torch.distributed import TCPStore
from metro_megatron.train.watchdog import Watchdog
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
watchdog = Watchdog(store, 0, 2, 1.0, Path(sys.argv[2]))
watchdog.sign("step 7")
store.set("metro_megatron/sign/1", sys.argv[3])
def wait_in_a_collective():
    time.sleep(60)
wait_in_a_collective()
"""


@pytest.mark.parametrize(
    ("looks", "since"), [(3, 5.0), (20, -5.0)], ids=["stopped whole after a sign", "an older sign"]
)
def test_the_rank_that_others_wait_for_is_named_with_the_stacks_of_who_waits(
    tmp_path: Path, looks: int, since: float
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    program = tmp_path / "waiting.py"
    program.write_text(WAITING)
    sign = [looks, time.time() + since, "evaluation batch 3", "gpu-17", 4711]
    result = run_program(program, store.port, tmp_path / "stacks", json.dumps(sign), timeout=60)
    assert result.returncode == EXIT_CODE
    assert "rank 1, process 4711 on gpu-17, has done nothing since" in result.stderr
    assert "when it began evaluation batch 3" in result.stderr and "timeout_minutes" in result.stderr
    assert "wait_in_a_collective" in (tmp_path / "stacks" / "rank_0.txt").read_text()
