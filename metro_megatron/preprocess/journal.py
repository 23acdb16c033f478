"""The work folder of a preprocessing run: plan and finished steps.

A step (a chunk, a shard) is finished when its journal entry, a JSON file, lies under its final name. An entry is
renamed into place after the files it speaks of, so kill -9 at any moment loses unfinished steps only.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.files import locked, remove_partial, sync_folder, write_whole

_PLAN, _LOCK = "plan.json", "lock"


class Journal:
    """What is known of a run that works in `folder`; one process at a time `opened` it, workers only add entries."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder alone, made if missing, without the unfinished files of a run that died.

        Raises UserError if another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / _LOCK, wait=False))
            except BlockingIOError as error:
                raise UserError(
                    f"{self.folder}: another process works in it; wait for it, or choose another prefix"
                ) from error
            remove_partial(self.folder)
            yield

    def plan(self) -> dict[str, Any] | None:
        """What the run is to do; None if no run has begun here. Raises UserError if it cannot be read."""
        return self.entry(_PLAN)

    def begin_or_continue(self, plan: Mapping[str, Any]) -> None:
        """Continue a run with this very plan; begin it, on an emptied folder, if another plan or none is here."""
        if self.plan() == plan:
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()
        self.write_entry(_PLAN, plan)

    def entry(self, name: str) -> dict[str, Any] | None:
        """Entry `name`, None if that step is not finished. Raises UserError for a damaged one."""
        path = self.folder / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); remove the folder {self.folder} and run again") from error

    def write_entry(self, name: str, content: Mapping[str, Any]) -> None:
        """Finish a step: the files it speaks of must be in place."""
        sync_folder(self.folder)
        write_whole(self.folder / name, to_json(content))


def to_json(content: Mapping[str, Any]) -> bytes:
    """JSON as this package writes it."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"
