"""Real processes for a test, forked from a server that has megatron-core loaded: ranks over gloo, and programs."""

import contextlib
import faulthandler
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

PRELOADED = ["tests.preloaded"]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    backend: str = "gloo",
    start_method: str = "forkserver",
) -> list[Any]:
    """Call `function(*args)` on `world_size` new processes; what each returned, by rank.

    The processes have joined one group, have torchrun's environment variables and one thread each.
    `function` is a top-level function of a test module; arguments and results are pickled. The first
    exception of a rank is raised here with its traceback. After `timeout` seconds every rank prints
    where it stands, all are ended, and TimeoutError is raised.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        context = multiprocessing.start_processes(
            _rank,
            (function, world_size, args, folder, timeout, backend),
            world_size,
            join=False,
            start_method=start_method,
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


def run_program(*argv: object, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run a Python file with arguments as `subprocess.run` would, where loading the libraries is not what is tested."""
    words = list(map(str, argv))
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="program_") as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("forkserver").Process(target=_program, args=(words, outputs))
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise TimeoutError(f"{' '.join(words)} took over {timeout} s")
        finally:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in outputs))


def _rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    folder: str,
    timeout: float,
    backend: str,
) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    faulthandler.dump_traceback_later(timeout)
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group(
        backend,
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


def _program(argv: list[str], outputs: list[Path]) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    for number, path in enumerate(outputs, 1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def end_with_parent() -> None:
    """The server lives as long as its children, so that they must see for themselves that pytest is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
