"""Real ranks for a test: processes on this machine that talk over gloo."""

import contextlib
import faulthandler
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` on `world_size` new processes; what each returned, by rank.

    The processes have joined one gloo group, have torchrun's environment variables and one thread each.
    `function` is a top-level function of a test module; arguments and results are pickled. The first
    exception of a rank is raised here with its traceback. After `timeout` seconds every rank prints
    where it stands, all are ended, and TimeoutError is raised.
    """
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        context = multiprocessing.start_processes(
            _rank, (function, world_size, args, folder, timeout), world_size, join=False, start_method="spawn"
        )
        deadline = time.monotonic() + timeout + 5
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{function.__name__} on {world_size} ranks took over {timeout} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(world_size)]


def _rank(
    rank: int, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], folder: str, timeout: float
) -> None:
    faulthandler.dump_traceback_later(timeout)
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    _result(folder, rank).write_bytes(pickle.dumps(function(*args)))
    dist.barrier()
    with contextlib.suppress(RuntimeError):  # a peer may be gone already
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result_{rank}"
