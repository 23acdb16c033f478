"""Checkpoint folders: `iter_0000500`, written whole or not at all, found again by the same command.

Threads write a checkpoint, beside the training or while it waits (checkpoint/saving.py).
RUN/latest_checkpointed_iteration.txt names the newest complete one. Each folder holds megatron-core's sharded tensors,
run_config.yaml, progress.json and integrity.json (sizes and SHA-256 of all files). What a run goes on from is decided
by the first rank.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from metro_megatron.checkpoint.files import (
    Damaged,
    check_metadata,
    files_of_rank,
    integrity_entries,
    iteration_folder,
    verify_integrity,
    verify_sizes,
)
from metro_megatron.checkpoint.publish import BYTES_PER_PARAMETER, prepare, publish, unfinished_folder
from metro_megatron.checkpoint.read import StoredModel
from metro_megatron.checkpoint.resume import (
    beginnings,
    is_branch_point,
    lost_tracker,
    overridden,
    rate_jumps,
    refuse_other_run,
)
from metro_megatron.checkpoint.saving import Exchange, Saved, Saving, unwritten
from metro_megatron.checkpoint.sharded_state import load_state, load_weights_into, sharded_state
from metro_megatron.checkpoint.trial import try_saving
from metro_megatron.checkpoint.writing import Planner, ShardWriter, Written
from metro_megatron.cli.command_line import describe_os_error, is_file_mistake
from metro_megatron.config.file import load_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.model.encoder import Pair
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer

SLOW_DISK = 1e8
"""Bytes/s."""

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
    """Saves and restores one run. Methods are collective calls, where nothing else is said."""

    def __init__(self, config: Config, layout: Layout, pair: Pair, optimizer: Optimizer):
        self.config = config
        self.run = Path(config.train.output)
        self.layout = layout
        self.pair = pair
        self.optimizer = optimizer
        self._planner = Planner(layout.world)
        self._saving: Saving | None = None
        """Begun, and not yet waited for."""
        self._beside: Saving | None = None
        """Begun beside the training, and not yet known to have ended."""

    def check_folder(self) -> None:
        """Raise UserError, on every rank, if the run could not be saved (checkpoint/trial.py)."""
        try_saving(self.run, self._num_parameters(), self.layout)

    def save(self, step: int, progress: dict[str, Any]) -> Saved:
        """Save after `step` steps, and wait for it; the caller has fetched the parameters.

        Raises UserError, on every rank, when the state could not be written; earlier checkpoints are then
        as they were.
        """
        with suppress(UserError):  # of the save before, which `ended` says
            self.wait()
        self._saving = self._start(step, progress, time.monotonic(), is_beside=False)
        saved = self.wait()
        assert saved is not None
        return saved

    def begin(self, step: int, progress: dict[str, Any], since: float) -> None:
        """As `save`, but wait only until the state has been copied to the host's memory: threads write the copy.

        Waits for the save before, of which there is one at most. What becomes of this one `ended` says, and `wait`.
        since: when training stopped for it, by time.monotonic.
        """
        with suppress(UserError):
            self.wait()
        self._saving = self._beside = self._start(step, progress, since, is_beside=True)

    def wait(self) -> Saved | None:
        """Wait for the save that has begun; None: there is none, or it has been waited for.

        Raises UserError, on every rank, when it has failed.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return None
        saving.join(self._of_all_ranks(saving.written()))
        outcome = self._of_all_ranks(saving.outcome)[0]
        if isinstance(outcome, list):
            raise UserError(outcome)
        return outcome

    def ended(self) -> Saved | list[str] | None:
        """On the first rank: what has become of a save that has begun and ended since this was last asked, saved or
        problems. No collective call."""
        outcome = self._beside.outcome if self._beside else None
        if outcome is not None:
            self._beside = None
        return outcome

    def close(self) -> None:
        """Wait for the save that has begun where the run ends otherwise than by saving: others may have ended before.
        No collective call."""
        if self._saving:
            self._saving.close()

    def restore(self) -> Restored | None:
        """Load what the run goes on from into the pair and the optimizer: the newest whole checkpoint of its folder, or
        the one that it branches from. None: there is none.

        Raises UserError, on every rank, for a checkpoint of another run, if none is whole, and with checkpoint.strict
        if the newest one is not.
        """
        with suppress(UserError):
            self.wait()
        found: list[list[Any]] = []
        self.on_first_rank(lambda: found.extend([beginnings(self.config), lost_tracker(self.run)]))
        folders, remarks = self._of_all_ranks(found)[0]
        strict = self.config.checkpoint.strict
        if remarks and strict:
            raise UserError([*remarks, "checkpoint.strict is set: write the step to go on from into that file"])
        for folder in folders:
            damage = self._damage(folder) or self._load(folder)
            if damage and (strict or folder == folders[-1] or is_branch_point(folder, self.config)):
                raise UserError([*remarks, *damage, "give another copy of a checkpoint, or another train.output"])
            if damage:
                remarks += [*damage, f"{folder} is not whole; going back to an older checkpoint"]
                continue
            told = overridden(load_config(folder / "run_config.yaml"), self.config)
            if is_branch_point(folder, self.config):
                remarks += rate_jumps(folder, self.config)
            return Restored(folder, json.loads((folder / "progress.json").read_text()), remarks, told)
        return None

    def _damage(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint beside the tensors' numbers, which are the most of it."""

        def look() -> None:
            verify_sizes(folder)
            verify_integrity(folder, [name for name in integrity_entries(folder) if not name.endswith(".distcp")])
            check_metadata(folder)

        problem = _attempt(look) if self.layout.rank == 0 else None
        return self._of_all_ranks(_problems(problem, str(folder)))[0]

    def _load(self, folder: Path) -> list[str]:
        """Load a checkpoint, and sum it by what is read, each rank some of its files. Returns what is wrong with it;
        what was loaded of it then counts for nothing."""
        self.on_first_rank(lambda: refuse_other_run(folder, self.config))
        names = files_of_rank(folder, self.layout.rank, self.layout.world.size())
        # Of damaged files, which other ranks may sum, it may raise anything.
        problem = _attempt(lambda: load_state(folder, self.pair, self.optimizer, self.layout, names), (Exception,))
        found = problem.problems if isinstance(problem, Damaged) else []
        damage = [one for part in self._of_all_ranks(found) for one in part]
        if not damage:
            self._agree(problem, str(folder))
        return damage

    def _start(self, step: int, progress: dict[str, Any], since: float, is_beside: bool) -> Saving:
        final, unfinished = iteration_folder(self.run, step), unfinished_folder(self.run, step)
        text = json.dumps(progress, indent=2) + "\n"
        self.on_first_rank(lambda: prepare(self.run, step, self._num_parameters()))
        name = self._of_all_ranks(uuid.uuid4().hex)[0]
        planned: list[ShardWriter] = []

        def plan() -> None:
            planned.append(self._planner.plan(sharded_state(self.pair, self.optimizer, self.layout), unfinished))
            if is_beside or self.layout.device.type != "cpu":  # threads have a GPU of their own to start with
                planned[0].copy()

        self._agree(_attempt(plan), unwritten(final))
        (writer,) = planned

        def finish(told: list[Written]) -> list[str]:
            return publish(self.run, self.config, step, text, writer.finish_all(told))

        world_size = self.layout.world.size()
        exchange = Exchange(distributed_c10d._get_default_store(), name, self.layout.rank, world_size)
        return Saving(writer, exchange, final, finish if self.layout.rank == 0 else None, since, is_beside)

    @property
    def seconds_to_load(self) -> float:
        """What a checkpoint takes from a slow disk."""
        return BYTES_PER_PARAMETER * self._num_parameters() / SLOW_DISK

    def _num_parameters(self) -> int:
        """Parameters of this rank times the ranks that hold different ones: an upper bound."""
        own = sum(parameter.numel() for _, module in self.pair.modules() for parameter in module.parameters())
        return own * self.layout.model.size()

    def on_first_rank(self, action: Callable[[], object]) -> None:
        """Do something on the first rank; what was in its way is raised as a UserError on all."""
        problem = _attempt(action) if self.layout.rank == 0 else None
        if isinstance(problem, OSError) and is_file_mistake(problem):
            problem = UserError(describe_os_error(problem))
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
    StoredModel.open(folder).verify_weights()
    load_weights_into(folder, pair, layout)


def _problems(problem: BaseException | None, subject: str) -> list[str]:
    if isinstance(problem, UserError):
        return problem.problems
    return [f"{subject}: {problem}"] if problem else []


def _attempt(
    action: Callable[[], Any], kinds: tuple[type[Exception], ...] = (UserError, OSError, RuntimeError)
) -> Exception | None:
    try:
        action()
    except kinds as problem:
        return problem
    return None
