"""Transformer Engine's Python, and a server that has it loaded, from which ranks are forked."""

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tests.distributed import end_with_parent, run_ranks

RELEASE = "2.11.0"
"""That of docs/transformer_engine.md."""
LOADING = 250.0
"""Seconds."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with Transformer Engine's Python alone, 0.7 MB to fetch; among installed packages it would be broken."""
    folder = str(tmp_path_factory.mktemp("transformer_engine"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    installed = subprocess.run([*pip, f"transformer-engine=={RELEASE}"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip finds no transformer-engine=={RELEASE}: {installed.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="session")
def with_te(site: str) -> Iterator[Callable[..., list[Any]]]:
    """Call a function of runs.py, by name, on so many ranks; what each returned."""
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    server = context.Process(target=_serve, args=(site, other))
    server.start()

    def call(name: str, world_size: int, *args: Any) -> list[Any]:
        own.send((name, world_size, args))
        if not own.poll(LOADING):
            raise TimeoutError(f"{name} took over {LOADING} s")
        results = own.recv()
        if isinstance(results, str):
            raise AssertionError(results)
        found: list[Any] = results
        return found

    yield call
    server.kill()
    server.join()


def _serve(site: str, connection: Connection) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    from tests.transformer_engine import standin

    standin.install(site)
    from tests.transformer_engine import runs

    while True:
        name, world_size, args = connection.recv()
        try:
            connection.send(run_ranks(getattr(runs, name), world_size, *args, start_method="fork"))
        except Exception as error:  # a rank's, with its traceback
            connection.send(str(error))
