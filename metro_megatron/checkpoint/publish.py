"""What the first rank does by itself for a checkpoint: room before it, its name when it is whole, old ones after it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metro_megatron.checkpoint.files import TRACKER, iteration_folder, saved_steps, write_integrity
from metro_megatron.config.file import save_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.files import move_whole, replace_text, sync_file, sync_folder

BYTES_PER_PARAMETER = 16  # 4 numbers of 4 bytes
"""Room wanted before a save: weights, masters and two moments in fp32."""
SET_ASIDE = ".set_aside"
"""Ends the name of a checkpoint that lies ahead of one that the run went back to."""
UNFINISHED = ".unfinished"
"""Ends the name of a checkpoint that is being written, or removed."""


def unfinished_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is written."""
    final = iteration_folder(run, step)
    return final.with_name(final.name + UNFINISHED)


def prepare(run: Path, step: int, num_parameters: int) -> None:
    """Make an empty folder for a checkpoint; what an earlier save has left goes. Raises UserError as check_room."""
    for leftover in run.glob(f"iter_*{UNFINISHED}"):
        shutil.rmtree(leftover, ignore_errors=True)
    check_room(run, num_parameters)
    unfinished_folder(run, step).mkdir(parents=True)


def check_room(run: Path, num_parameters: int) -> None:
    """Raise UserError if the disk has no room for a checkpoint of so many parameters."""
    needed = BYTES_PER_PARAMETER * num_parameters
    free = shutil.disk_usage(run).free
    if free < needed:
        raise UserError(
            f"a checkpoint needs about {needed / 1e9:.2f} GB, but {run} has {free / 1e9:.2f} GB free: "
            "free some space or lower checkpoint.keep_last, then run the same command again"
        )


def publish(run: Path, config: Config, step: int, progress: str, written: Mapping[str, dict[str, Any]]) -> list[str]:
    """Give a checkpoint its name, when the tensors' files are on the disk; remove older ones.

    progress: text of progress.json. written: entries of these files in integrity.json. Returns what `retire` does.
    Raises UserError where a file is not there.
    """
    unfinished, final = unfinished_folder(run, step), iteration_folder(run, step)
    save_config(config, unfinished / "run_config.yaml")
    (unfinished / "progress.json").write_text(progress)
    # In this order: what names files comes after them, the folder gets its name when all is on the disk, and the
    # tracker moves last. A crash between two lines leaves the checkpoint before.
    write_integrity(unfinished, written)
    for path in unfinished.iterdir():
        if path.name not in written:
            sync_file(path)
    sync_folder(unfinished)
    move_whole(unfinished, final)
    replace_text(run / TRACKER, f"{step}\n")
    return retire(run, step, config.checkpoint.keep_last)


def retire(run: Path, step: int, keep_last: int) -> list[str]:
    """Remove checkpoints that are too many, and rename those of later steps, which another past has written.

    Returns what could not be removed, which is no reason to end a run.
    """
    folders = {saved: iteration_folder(run, saved) for saved in saved_steps(run)}
    earlier = [folder for saved, folder in folders.items() if saved <= step]
    keep = keep_last or len(earlier)
    remarks = []
    for old in earlier[:-keep]:
        try:
            if old.is_symlink():
                old.unlink()
            else:
                # Under its name it is whole, or not there: a process may be killed while it removes files.
                going = old.with_name(old.name + UNFINISHED)
                move_whole(old, going)
                shutil.rmtree(going)
        except OSError as error:
            remarks.append(f"warning: {error}; {old} stays")
    for folder in (folder for saved, folder in folders.items() if saved > step):
        try:
            move_whole(folder, folder.with_name(folder.name + SET_ASIDE))
        except OSError as error:
            remarks.append(f"warning: {error}; {folder} stays")
        else:
            what = "is of a step that this run has not come to since it went back"
            remarks.append(f"{folder} {what}: {SET_ASIDE} now")
    return remarks
