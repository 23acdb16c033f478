"""`make citizen`: is an exported folder a full citizen of transformers? Every check with what it found."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError

if TYPE_CHECKING:
    from tools.citizen.subject import Check, Checks


@dataclass(frozen=True)
class Options:
    """Which folder."""

    model: str = "runs/demo/model"
    """Exported folder to check."""
    only: str = ""
    """Run the checks whose names hold this."""


def main(options: Options) -> int:
    """Check an exported folder with every library that its users have; ends with status 1 if one fails."""
    folder = Path(options.model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json; give an exported folder, or run make demo, which makes runs/demo/model"
        )
    os.environ["HF_HUB_OFFLINE"] = "1"
    groups = _groups()
    _refuse_damage(folder)
    names = [name for checks in groups.values() for name in checks]
    if not any(options.only in name for name in names):
        raise UserError(f"--only {options.only}: no check's name holds it; the checks are {', '.join(names)}")
    failed, number = 0, 0
    print("   | group | check | result | found | time")
    with tempfile.TemporaryDirectory() as scratch:
        for group, checks in groups.items():
            for name, check in checks.items():
                if options.only not in name:
                    continue
                number += 1
                place = Path(scratch) / str(number)
                place.mkdir()
                failed += not _run(f"{number:2} | {group} | {name}", check, folder.resolve(), place)
    print(f"\n{number} checks of {folder}: {number - failed} passed, {failed} failed")
    return int(failed > 0)


def _refuse_damage(folder: Path) -> None:
    """Raise UserError for files that are missing or damaged, which every check would stumble over."""
    from metro_megatron.hf.folder import exported_config, folder_tokenizer
    from metro_megatron.hf.stored import stored_tensors

    folder_tokenizer(folder, exported_config(folder))
    stored_tensors(folder)


def _groups() -> dict[str, Checks]:
    """The checks; late, as they load torch."""
    from transformers.utils import logging

    from tools.citizen.calls import CALLS
    from tools.citizen.loading import LOADING
    from tools.citizen.losses import LOSSES
    from tools.citizen.neighbours import NEIGHBOURS
    from tools.citizen.rows import ROWS

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return {"loading": LOADING, "calls": CALLS, "rows": ROWS, "losses": LOSSES, "neighbours": NEIGHBOURS}


def _run(title: str, check: Check, folder: Path, scratch: Path) -> bool:
    """Print a row of the table; whether the check passed."""
    from tools.citizen.subject import Subject

    start = time.monotonic()
    try:
        found, passed = check(Subject(folder, scratch)), True
    except Exception as error:
        found, passed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
    seconds = time.monotonic() - start
    print(f"{title} | {'passed' if passed else 'FAILED'} | {found} | {seconds:.1f} s", flush=True)
    return passed


if __name__ == "__main__":
    run_tool(main)
