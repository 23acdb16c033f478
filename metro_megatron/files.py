"""Output folders that are there whole or not at all."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from metro_megatron.errors import UserError


def refuse_foreign(output: Path, own_files: Collection[str]) -> None:
    """Raise UserError if `output` exists and is anything but a folder of files that match a pattern of own_files."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; choose a folder")
    names = sorted(path.name for path in output.iterdir())
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in own_files)]
    if foreign:
        raise UserError(f"{output} holds {foreign[0]!r}, which this tool has not written; choose another folder")


@contextmanager
def whole_folder(output: Path, own_files: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder to be filled; it becomes `output` when the block ends, and is removed if it raises.

    An earlier output, made of own_files, is replaced; anything else there raises UserError.
    """
    refuse_foreign(output, own_files)
    output = output.absolute()
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        refuse_foreign(output, own_files)
        if output.exists():
            replaced = output.with_name(f".{output.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
            unfinished.rename(output)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
