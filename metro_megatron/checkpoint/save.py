"""Checkpoint folders: `iter_0000500`, written whole or not at all, found again by the same command.

RUN/latest_checkpointed_iteration.txt names the newest complete one. Each folder holds megatron-core's
sharded tensors, run_config.yaml, progress.json and integrity.json (sizes and SHA-256 of all files).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from metro_megatron import mcore
from metro_megatron.checkpoint.files import (
    TRACKER,
    check_metadata,
    iteration_folder,
    verify_integrity,
    write_integrity,
)
from metro_megatron.checkpoint.resume import refuse_other_run
from metro_megatron.checkpoint.sharded_state import load_model_state, load_state, model_state, sharded_state
from metro_megatron.config.file import save_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.files import move_whole, replace_text, sync_file, sync_folder
from metro_megatron.model.encoder import Pair
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer

BYTES_PER_PARAMETER = 16  # 4 numbers of 4 bytes
"""Room wanted before a save: weights, masters and two moments in fp32."""


class Checkpoints:
    """Saves and restores one run. All methods are collective calls."""

    def __init__(self, config: Config, layout: Layout, pair: Pair, optimizer: Optimizer):
        self.config = config
        self.run = Path(config.train.output)
        self.layout = layout
        self.pair = pair
        self.optimizer = optimizer

    def save(self, step: int, progress: dict[str, Any]) -> Path:
        """Save after `step` steps; the caller has fetched the parameters.

        Raises UserError, on every rank, when the state could not be written; earlier checkpoints are then
        as they were.
        """
        final = iteration_folder(self.run, step)
        unfinished = final.with_name(final.name + ".unfinished")
        self._on_first_rank(lambda: self._prepare(unfinished))
        mcore.start_checkpoint_writer()
        try:
            state = sharded_state(self.pair, self.optimizer, self.layout, is_loading=False)
            problem = _attempt(lambda: dist_checkpointing.save(state, str(unfinished)))
        finally:
            # Also after a failure: a rank that went ahead would agree on a checkpoint that others still write.
            dist.barrier(group=self.layout.world)
        self._agree(problem, f"checkpoint {final} could not be written")
        self._on_first_rank(lambda: self._complete(unfinished, final, step, progress))
        return final

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint of the run, or one that it branches from, into the pair and the optimizer; returns its
        progress."""
        self._on_first_rank(lambda: self._check(folder))
        state = sharded_state(self.pair, self.optimizer, self.layout, is_loading=True)
        loaded = dist_checkpointing.load(state, str(folder))
        load_state(self.pair, self.optimizer, loaded)
        return json.loads((folder / "progress.json").read_text())

    def _prepare(self, unfinished: Path) -> None:
        for leftover in self.run.glob("iter_*.unfinished"):
            shutil.rmtree(leftover)
        needed = BYTES_PER_PARAMETER * self._num_parameters()
        free = shutil.disk_usage(self.run).free
        if free < needed:
            raise UserError(
                f"a checkpoint needs about {needed / 1e9:.2f} GB, but {self.run} has {free / 1e9:.2f} GB free: "
                "free some space or lower checkpoint.keep_last, then run the same command again"
            )
        unfinished.mkdir(parents=True)

    def _num_parameters(self) -> int:
        """Parameters of this rank times the ranks that hold different ones: an upper bound."""
        own = sum(parameter.numel() for _, module in self.pair.modules() for parameter in module.parameters())
        return own * self.layout.model.size()

    def _complete(self, unfinished: Path, final: Path, step: int, progress: dict[str, Any]) -> None:
        save_config(self.config, unfinished / "run_config.yaml")
        (unfinished / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
        # In this order: what names files comes after them, the folder gets its name when all is on the disk, and the
        # tracker moves last. A crash between two lines leaves the checkpoint before.
        write_integrity(unfinished)
        for path in unfinished.iterdir():
            sync_file(path)
        sync_folder(unfinished)
        move_whole(unfinished, final)
        replace_text(self.run / TRACKER, f"{step}\n")
        keep = self.config.checkpoint.keep_last
        complete = sorted(folder for folder in self.run.glob("iter_*") if folder.name[5:].isdigit())
        for old in complete[:-keep] if keep else []:
            shutil.rmtree(old)

    def _check(self, folder: Path) -> None:
        """Refuse a damaged or foreign checkpoint before a byte of it is loaded."""
        verify_integrity(folder)
        check_metadata(folder)
        refuse_other_run(folder, self.config)

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        problem = _attempt(action) if self.layout.rank == 0 else None
        self._agree(problem, f"{self.run}")

    def _agree(self, problem: BaseException | None, subject: str) -> None:
        """Raise the first rank's problem on all ranks, or return on all."""
        own = problem.problems if isinstance(problem, UserError) else [f"{subject}: {problem}"] if problem else []
        problems: list[list[str]] = [[]] * self.layout.world.size()
        dist.all_gather_object(problems, own, group=self.layout.world)
        first = next((one for one in problems if one), None)
        if first:
            raise UserError(first) from problem


def load_weights(folder: Path, pair: Pair, layout: Layout) -> None:
    """Load the parameters alone of a checkpoint folder. Raises UserError when it is damaged."""
    verify_integrity(folder)
    check_metadata(folder)
    load_model_state(pair, dist_checkpointing.load(model_state(pair, layout), str(folder)))


def _attempt(action: Callable[[], Any]) -> Exception | None:
    try:
        action()
    except (UserError, OSError, RuntimeError, dist_checkpointing.core.CheckpointingException) as problem:
        return problem
    return None
