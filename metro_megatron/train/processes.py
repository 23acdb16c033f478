"""What the processes of a run are to each other and to their machine: who speaks, who has the run folder, who ends."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from metro_megatron.errors import UserError
from metro_megatron.files import locked

LOCK = "lock"
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Set to 1, it has torchrun open a store for each start of its processes."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""torchrun's to each process, two levels below a new folder of those that it starts together on a machine."""
PR_SET_PDEATHSIG = 1
SECONDS_FOR_SPEAKER = 5.0
"""How long other processes wait before they end with a mistake, so that the speaker's message is printed: torchrun ends
all processes when one has failed."""


def speak_or_wait(problems: list[str]) -> list[str]:
    """What this process shall say of its mistakes: all processes may have made the same, one a machine says them.

    Others wait and say nothing. Not of the first rank, lines begin with host and rank.
    """
    try:
        # It outlives this process: another may come to its mistakes between its end and torchrun's signal.
        if error_file := os.environ.get(ERROR_FILE):
            (Path(error_file).parents[1] / "spoken").touch(exist_ok=False)
    except FileExistsError:
        time.sleep(SECONDS_FOR_SPEAKER)
        return []
    except OSError:
        pass  # said twice rather than not
    rank = os.environ.get("RANK", "0")
    return problems if rank == "0" else [f"{socket.gethostname()}, rank {rank}: {problem}" for problem in problems]


def end_with_parent() -> None:
    """Be sent SIGTERM when torchrun ends without ending its processes: a killed one cannot."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def refuse_used_store() -> None:
    """Raise UserError if torchrun has started the processes again with the store of those before, in which addresses
    of these stand: they would wait for processes that are gone (pytorch's issue 135712)."""
    is_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if is_again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun has started the processes again, but they cannot find each other by the store that it shares "
            f"with them: export {NEW_STORE}=1 before torchrun --max-restarts; the same command continues the run"
        )


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Have a run folder alone, on the first process; the kernel ends the claim with the process.

    Raises UserError naming who has it. On a file system without locks nobody is kept out.
    """
    path = run / LOCK
    try:
        with locked(path, wait=False):
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n", encoding="utf-8")
            yield
    except BlockingIOError as error:
        owner = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        raise UserError(
            f"{run}: {owner} trains in it; wait for it or end it, or choose another train.output"
        ) from error
