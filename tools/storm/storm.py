"""`make storm`: disturb a tiny run again and again; is it still the one that nothing has disturbed?"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.errors import UserError
from metro_megatron.files import locked


@dataclass(frozen=True)
class Options:
    """How many faults, and where."""

    faults: Annotated[int, at_least(1)] = 300
    """Faults that come in time; attempts that end before theirs are counted apart."""
    output: str = "runs/storm"
    """Folder of the journal and of what trains; the same command goes on there."""
    results: str = ""
    """Page of counts that is written in the end; empty: storm.md in the output."""
    seed: int = 0
    """Another one draws other faults."""
    shim: bool = True
    """Whether calls of the system fail, and writers are killed in them: needs a C compiler."""


def main(options: Options) -> int:
    """Disturb runs until enough faults have come, have the last ones come to their end, and count.

    Two series alternate: one layout, and another layout at each start. A run that has come to its end is compared
    with the undisturbed one. Ends with status 1 if anything was not as promised.
    """
    if sys.platform != "linux":
        raise UserError("make storm needs Linux: orphaned processes, signals and preloaded libraries are its own")
    output = Path(options.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output / "lock", wait=False):
            if options.shim:
                _load_shim(output / "shim.so")
            return _storm(options, output)
    except BlockingIOError as error:
        raise UserError(f"{output}: another process goes through this storm; wait for it or end it") from error


def _load_shim(path: Path) -> None:
    """Begin again with the shim preloaded, which processes that are forked have, too."""
    from tools.storm.faults import Shim

    if Shim.is_loaded():
        return
    Shim.build(path)
    os.environ["LD_PRELOAD"] = f"{path} {os.environ.get('LD_PRELOAD', '')}".strip()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _storm(options: Options, output: Path) -> int:
    from tools.storm.journal import Journal, problems, report
    from tools.storm.processes import adopt_orphans, load
    from tools.storm.series import Storm

    journal = Journal(output / "journal.jsonl", {"seed": options.seed, "shim": options.shim})
    load()
    adopt_orphans()
    storm = Storm(output, journal, options.seed, options.shim)
    storm.prepare()
    while journal.hits < options.faults:
        storm.next_attempt(f"{journal.hits + 1}/{options.faults}")
    storm.finish()
    results = Path(options.results) if options.results else output / "storm.md"
    results.write_text(report(journal, storm.train_steps, _about(options)), encoding="utf-8")
    broken = problems(journal)
    print(results.read_text(encoding="utf-8"), *(f"broken: {problem}" for problem in broken), sep="\n")
    print(f"written to {results}; attempts and what they said are in {output}")
    return int(bool(broken))


def _about(options: Options) -> list[str]:
    from importlib.metadata import version

    from tools.campaign.campaign import commit

    command = f"make storm FAULTS={options.faults}" + ("" if options.shim else ", without the shim")
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "megatron-core"))
    return [
        f"`{command}`, seed {options.seed}, {datetime.now(UTC).date().isoformat()}, commit {commit()}",
        f"Python {platform.python_version()}, {versions}, {len(os.sched_getaffinity(0))} cores",
    ]


if __name__ == "__main__":
    run_tool(main)
