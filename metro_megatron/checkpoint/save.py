"""Checkpoint folders: `iter_0000500`, written whole or not at all, found again by the same command.

RUN/latest_checkpointed_iteration.txt names the newest complete one. Each folder holds megatron-core's
sharded tensors, run_config.yaml, progress.json and integrity.json (sizes and SHA-256 of all files). What a run goes on
from is decided by the first rank.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from metro_megatron import mcore
from metro_megatron.checkpoint.files import (
    MARKER,
    TRACKER,
    check_metadata,
    file_entries,
    iteration_folder,
    saved_steps,
    verify_integrity,
    write_integrity,
)
from metro_megatron.checkpoint.resume import beginnings, is_branch_point, lost_tracker, overridden, refuse_other_run
from metro_megatron.checkpoint.sharded_state import load_model_state, load_state, model_state, sharded_state
from metro_megatron.config.file import load_config, save_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.files import move_whole, replace_text, sync_file, sync_folder
from metro_megatron.model.encoder import Pair
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer

BYTES_PER_PARAMETER = 16  # 4 numbers of 4 bytes
"""Room wanted before a save: weights, masters and two moments in fp32."""
SECONDS_TO_APPEAR = 10.0
"""How long a new file may take to be seen by other machines, whose network file systems remember what was absent."""
SET_ASIDE = ".set_aside"
"""Ends the name of a checkpoint that lies ahead of one that the run went back to."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Restored:
    """What a run goes on from."""

    folder: Path
    progress: dict[str, Any]
    remarks: list[str]
    """Why it is not the newest, if it is not."""
    overridden: dict[str, tuple[Any, Any]]
    """Options that the run was told anew: as they were, and as they are."""


class Checkpoints:
    """Saves and restores one run. All methods are collective calls."""

    def __init__(self, config: Config, layout: Layout, pair: Pair, optimizer: Optimizer):
        self.config = config
        self.run = Path(config.train.output)
        self.layout = layout
        self.pair = pair
        self.optimizer = optimizer

    def check_folder(self) -> None:
        """Raise UserError, on every rank, if the run folder cannot be written, has no room for a checkpoint, or is not
        one that all ranks see."""
        # Of this start alone: one that a killed start has left must not be taken for it.
        marker = self.run / f"{MARKER}{self._of_all_ranks(uuid.uuid4().hex)[0]}"

        def prepare() -> None:
            self.run.mkdir(parents=True, exist_ok=True)
            for left in self.run.glob(f"{MARKER}*"):
                left.unlink()
            marker.touch()

        self._on_first_rank(prepare)
        end = time.monotonic() + SECONDS_TO_APPEAR
        while not (is_seen := marker.exists()) and time.monotonic() < end:
            time.sleep(0.1)
        problem = UserError(
            f"{socket.gethostname()}, rank {self.layout.rank}: does not see what the first rank writes into "
            f"{self.run.absolute()}; train.output must be one folder for all machines, on storage that they share"
        )
        unseen = next((one for one in self._of_all_ranks([] if is_seen else problem.problems) if one), None)
        self._on_first_rank(lambda: marker.unlink(missing_ok=True))
        if unseen:
            raise UserError(unseen)
        self._on_first_rank(self._check_room)

    def save(self, step: int, progress: dict[str, Any]) -> tuple[Path, list[str]]:
        """Save after `step` steps; the caller has fetched the parameters. Returns the folder, and on the first rank
        what else there is to say.

        Raises UserError, on every rank, when the state could not be written; earlier checkpoints are then
        as they were.
        """
        final = iteration_folder(self.run, step)
        unfinished = final.with_name(final.name + ".unfinished")
        self._on_first_rank(lambda: self._prepare(unfinished))
        written: dict[str, Any] = {}
        try:
            state = sharded_state(self.pair, self.optimizer, self.layout, is_loading=False)
            problem = _attempt(lambda: self._write(state, unfinished, written))
        finally:
            # Also after a failure: a rank that went ahead would agree on a checkpoint that others still write.
            dist.barrier(group=self.layout.world)
        self._agree(problem, f"checkpoint {final} could not be written")
        entries = {name: entry for part in self._of_all_ranks(written) for name, entry in part.items()}
        remarks: list[str] = []
        self._on_first_rank(lambda: self._complete(unfinished, final, step, progress, entries))
        self._on_first_rank(lambda: remarks.extend(self._retire(step)))
        return final, remarks

    def restore(self) -> Restored | None:
        """Load what the run goes on from into the pair and the optimizer: the newest whole checkpoint of its folder, or
        the one that it branches from. None: there is none.

        Raises UserError, on every rank, for a checkpoint of another run, if none is whole, and with checkpoint.strict
        if the newest one is not.
        """
        found: list[list[Any]] = []
        self._on_first_rank(lambda: found.extend([beginnings(self.config), lost_tracker(self.run)]))
        folders, remarks = self._of_all_ranks(found)[0]
        strict = self.config.checkpoint.strict
        if remarks and strict:
            raise UserError([*remarks, "checkpoint.strict is set: write the step to go on from into that file"])
        for folder in folders:
            damage = self._damage(folder)
            if damage and (strict or folder == folders[-1] or is_branch_point(folder, self.config)):
                raise UserError([*remarks, *damage, "give another copy of a checkpoint, or another train.output"])
            if damage:
                remarks += [*damage, f"{folder} is not whole; going back to an older checkpoint"]
                continue
            self._on_first_rank(lambda: refuse_other_run(folder, self.config))  # noqa: B023 - called at once
            state = sharded_state(self.pair, self.optimizer, self.layout, is_loading=True)
            load_state(self.pair, self.optimizer, dist_checkpointing.load(state, str(folder)))
            told = overridden(load_config(folder / "run_config.yaml"), self.config)
            return Restored(folder, json.loads((folder / "progress.json").read_text()), remarks, told)
        return None

    def _damage(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint, before a byte of it is loaded; each rank looks at some of its files."""

        def look() -> None:
            verify_integrity(folder, self.layout.rank, self.layout.world.size())
            if self.layout.rank == 0:
                check_metadata(folder)

        return [problem for part in self._of_all_ranks(_problems(_attempt(look), str(folder))) for problem in part]

    def _write(self, state: Any, unfinished: Path, written: dict[str, Any]) -> None:
        """This rank's part; `written` gets the entries of its files, hashed while they are still in memory."""
        with mcore.writing_in_threads():
            dist_checkpointing.save(state, str(unfinished))
        written |= file_entries(unfinished.glob(f"__{self.layout.rank}_*"))

    def _prepare(self, unfinished: Path) -> None:
        for leftover in self.run.glob("iter_*.unfinished"):
            shutil.rmtree(leftover)
        self._check_room()
        unfinished.mkdir(parents=True)

    def _check_room(self) -> None:
        needed = BYTES_PER_PARAMETER * self._num_parameters()
        free = shutil.disk_usage(self.run).free
        if free < needed:
            raise UserError(
                f"a checkpoint needs about {needed / 1e9:.2f} GB, but {self.run} has {free / 1e9:.2f} GB free: "
                "free some space or lower checkpoint.keep_last, then run the same command again"
            )

    def _num_parameters(self) -> int:
        """Parameters of this rank times the ranks that hold different ones: an upper bound."""
        own = sum(parameter.numel() for _, module in self.pair.modules() for parameter in module.parameters())
        return own * self.layout.model.size()

    def _complete(
        self, unfinished: Path, final: Path, step: int, progress: dict[str, Any], written: dict[str, Any]
    ) -> None:
        save_config(self.config, unfinished / "run_config.yaml")
        (unfinished / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
        # In this order: what names files comes after them, the folder gets its name when all is on the disk, and the
        # tracker moves last. A crash between two lines leaves the checkpoint before.
        write_integrity(unfinished, written)
        for path in unfinished.iterdir():
            sync_file(path)
        sync_folder(unfinished)
        move_whole(unfinished, final)
        replace_text(self.run / TRACKER, f"{step}\n")

    def _retire(self, step: int) -> list[str]:
        """Remove checkpoints that are too many, and rename those of later steps, which another past has written.

        Returns what could not be removed, which is no reason to end a run.
        """
        folders = {saved: iteration_folder(self.run, saved) for saved in saved_steps(self.run)}
        earlier = [folder for saved, folder in folders.items() if saved <= step]
        keep = self.config.checkpoint.keep_last or len(earlier)
        remarks = []
        for old in earlier[:-keep]:
            try:
                if old.is_symlink():
                    old.unlink()
                else:
                    shutil.rmtree(old)
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

    def _on_first_rank(self, action: Callable[[], object]) -> None:
        problem = _attempt(action) if self.layout.rank == 0 else None
        self._agree(problem, f"{self.run}")

    def _agree(self, problem: BaseException | None, subject: str) -> None:
        """Raise the first rank's problem on all ranks, or return on all."""
        first = next((one for one in self._of_all_ranks(_problems(problem, subject)) if one), None)
        if first:
            raise UserError(first) from problem

    def _of_all_ranks(self, own: Value) -> list[Value]:
        """What each rank has, by rank."""
        values: list[Any] = [None] * self.layout.world.size()
        dist.all_gather_object(values, own, group=self.layout.world)
        return values


def load_weights(folder: Path, pair: Pair, layout: Layout) -> None:
    """Load the parameters alone of a checkpoint folder. Raises UserError when it is damaged."""
    verify_integrity(folder)
    check_metadata(folder)
    load_model_state(pair, dist_checkpointing.load(model_state(pair, layout), str(folder)))


def _problems(problem: BaseException | None, subject: str) -> list[str]:
    if isinstance(problem, UserError):
        return problem.problems
    return [f"{subject}: {problem}"] if problem else []


def _attempt(action: Callable[[], Any]) -> Exception | None:
    try:
        action()
    except CheckpointException as problem:  # torch's, no Exception; whose failures the first rank alone may know
        failures = [failure for failure, _ in problem.failures.values()]
        return RuntimeError(str(failures[0]) if failures else "another rank could not write its part")
    except (UserError, OSError, RuntimeError, dist_checkpointing.core.CheckpointingException) as problem:
        return problem
    return None
