"""Where in the data the steps of a run begin, from what it has left on the disk."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from metro_megatron.checkpoint.files import checkpoint_sha256, iteration_folder, resumable_steps
from metro_megatron.config.schema import Config
from metro_megatron.files import json_lines


def known_position(run: Path, config: Config, step: int) -> tuple[int, int]:
    """(steps done, global position of the next sample) of the last place up to `step` that is known.

    Of log lines, checkpoints, beginnings of phases, and the checkpoint that the run branches from. (0, 0) if there is
    none. config: the run's.
    """
    # Of one step the first: lines are dropped where a run goes back, checkpoints stay until it saves again.
    return max((one for one in _positions(run, config) if one[0] <= step), key=lambda one: one[0], default=(0, 0))


def branch_step(config: Config) -> int:
    """Steps done at the checkpoint that a run branches from; 0: it does not, or that is gone."""
    return _progress(Path(config.train.branch_from)).get("step", 0) if config.train.branch_from else 0


def _positions(run: Path, config: Config) -> Iterator[tuple[int, int]]:
    # Lines of evaluations name no position.
    for line in json_lines(run / "metrics.jsonl", "step", "consumed_samples"):
        yield int(line["step"]), int(line["consumed_samples"])
    branch: Mapping[str, Any] = {}
    for step in resumable_steps(run):
        saved = _progress(iteration_folder(run, step))
        yield from _of_progress(saved, config)
        branch = branch or saved.get("branch", {})
    if "consumed_samples" in branch:
        yield branch["step"], branch["consumed_samples"]
    elif config.train.branch_from:  # nothing is saved yet, or by an earlier release
        point = Path(config.train.branch_from)
        with suppress(OSError):
            if not branch or branch["checkpoint"] == checkpoint_sha256(point):
                yield from _of_progress(_progress(point), config)


def _progress(folder: Path) -> dict[str, Any]:
    """progress.json of a checkpoint, or nothing if it is damaged, of which others tell."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        figures = json.loads((folder / "progress.json").read_bytes())
        return figures | {name: int(figures[name]) for name in ("step", "consumed_samples")}
    return {}


def _of_progress(figures: Mapping[str, Any], config: Config) -> Iterator[tuple[int, int]]:
    if not figures:
        return
    begins = figures.get("phase_begins", [0])
    begun = [start for start in config.phase_starts if start == 0 or start < figures["step"]]
    if len(begun) == len(begins):  # else of a past in which phases began elsewhere
        yield figures["step"], figures["consumed_samples"]
        yield from zip(begun, begins, strict=True)
