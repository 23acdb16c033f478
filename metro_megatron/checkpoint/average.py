"""Weighted averages of checkpoints: weights without an optimizer, in a checkpoint folder of their own.

Sums are in fp64, results in fp32, whatever the format of the runs: rounded to bf16, an average would lose what it
gains. Files are read and written tensor by tensor: however many checkpoints there are, memory holds one tensor of
theirs at a time beside its sum.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from metro_megatron.checkpoint.files import AVERAGE, INTEGRITY, METADATA, checkpoint_sha256, write_integrity
from metro_megatron.checkpoint.read import (
    SEGMENTS,
    TOKENIZER,
    StoredModel,
    find_segments,
    find_tokenizer,
    read_average,
    without_distributed_warning,
)
from metro_megatron.cli.options import flatten
from metro_megatron.config.file import load_config, save_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.files import whole_folder
from metro_megatron.tokenizer.tokenizer import Tokenizer, copy_tokenizer

Part = Literal["pair", "main"]
PARTS: dict[Part, str] = {"pair": "auxiliary and main", "main": "main alone"}
AUXILIARY = "aux."
"""What the names of tensors begin with that main does without."""
OF_PAIR = ("model.auxiliary_", "corruption.", f"tensor {AUXILIARY}")
"""What the facts begin with that main alone does not depend on."""
AVERAGED_FILES = (
    "*.distcp",
    METADATA,
    "metadata.json",
    "common.pt",
    "run_config.yaml",
    AVERAGE,
    INTEGRITY,
    TOKENIZER,
    SEGMENTS,
)
"""Patterns of all that the folder of an average holds."""

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json of megatron-core's checkpoints."""


@dataclass(frozen=True)
class Source:
    """A checkpoint and its share of an average."""

    model: StoredModel
    config: Config
    tokenizer: Tokenizer
    weight: float

    @classmethod
    def open(cls, folder: Path, weight: float) -> Source:
        """Raises UserError as StoredModel.open, find_tokenizer and load_config, and for an average."""
        if read_average(folder):
            raise UserError(f"{folder}: an average itself; name the checkpoints that its {AVERAGE} lists, with weights")
        model = StoredModel.open(folder)
        model.verify_weights()
        tokenizer = Tokenizer.from_folder(find_tokenizer(folder))
        return cls(model, load_config(folder / "run_config.yaml"), tokenizer, weight)

    def facts(self, part: Part) -> dict[str, Any]:
        """What checkpoints whose part is averaged have in common."""
        config = self.config
        found = {
            **{f"model.{name}": value for name, value in flatten(config.model).items()},
            "objective.main": config.objective.main,
            "corruption.source": config.corruption.source,
            "tokenizer": self.tokenizer.sha256[:12],
            **{f"tensor {name}": tuple(stored.size) for name, stored in self.model.stored.items()},
        }
        return {name: value for name, value in found.items() if part == "pair" or not name.startswith(OF_PAIR)}

    def names(self, part: Part) -> list[str]:
        """Of the tensors of a part."""
        return [name for name in self.model.stored if is_in(name, part)]

    @property
    def record(self) -> dict[str, Any]:
        """What average.json says of it; integrity.json has the hashes of all its files."""
        folder = self.model.folder.resolve()
        return {
            "checkpoint": folder.name,
            "run": folder.parent.name,
            "seed": self.config.train.seed,
            "weight": self.weight,
            "integrity_sha256": checkpoint_sha256(folder),
        }


class Average:
    """Of some checkpoints, whose weights sum to 1: both models, or main alone.

    Raises UserError naming everything in which they are of different models.
    """

    def __init__(self, sources: Sequence[Source], part: Part):
        self._sources = sources
        self._part = part
        problems = [problem for other in sources[1:] for problem in _differences(sources[0], other, part)]
        if problems:
            raise UserError([*problems, "only checkpoints of one architecture have an average; give others"])
        self.names = sources[0].names(part)
        """Of its tensors."""

    @property
    def num_bytes(self) -> int:
        """Of what is read of all sources."""
        return sum(source.model.num_bytes(self.names) for source in self._sources)

    def tensor(self, name: str, on_bytes: Callable[[int], object] = lambda size: None) -> Tensor:
        """In fp32, summed in the order of the sources. Raises UserError where a source is not finite."""
        total: Tensor | None = None
        for source in self._sources:
            tensor = source.model.read([name])[name]
            if not tensor.isfinite().all():
                raise UserError(
                    f"{source.model.folder}: tensor {name} is not finite, the run had diverged; leave it out"
                )
            on_bytes(tensor.nbytes)
            share = tensor.double().mul_(source.weight)
            total = share if total is None else total.add_(share)
        assert total is not None
        return total.float()

    def write(self, output: Path, on_bytes: Callable[[int], object] = lambda size: None) -> None:
        """Write a checkpoint folder with a tokenizer; an earlier average at `output` is replaced.

        The configuration is the last source's; average.json names all sources, and the options in which they differ.
        `on_bytes` hears of what is read. Raises UserError as `tensor`, and for an output that is something else.
        """
        last = self._sources[-1]
        with whole_folder(output, AVERAGED_FILES) as folder:
            self._write_tensors(folder, on_bytes)
            (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
            torch.save({}, folder / "common.pt")
            save_config(last.config, folder / "run_config.yaml")
            has_auxiliary = any(name.startswith(AUXILIARY) for name in self.names)
            record = {
                "part": "pair" if has_auxiliary else "main",
                "sources": [source.record for source in self._sources],
                "differing_options": _differing_options([source.config for source in self._sources]),
            }
            (folder / AVERAGE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            copy_tokenizer(last.tokenizer.path, folder / TOKENIZER)
            if segments := find_segments(last.model.folder):
                shutil.copyfile(segments, folder / SEGMENTS)
            write_integrity(folder)

    def _write_tensors(self, folder: Path, on_bytes: Callable[[int], object]) -> None:
        first = self._sources[0].model
        planned: dict[str, Any] = {
            name: torch.empty(first.stored[name].size, dtype=torch.float32, device="meta") for name in self.names
        }
        layers = {name: io.BytesIO(content) for name, content in first.extra_states() if is_in(name, self._part)}
        # A file for each tensor: the writer keeps all tensors of a file until that is closed.
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, thread_count=1)
        planner = _Planner(lambda name: layers[name] if name in layers else self.tensor(name, on_bytes))
        with without_distributed_warning():
            try:
                dcp.save({**planned, **layers}, storage_writer=writer, planner=planner, no_dist=True)
            except dcp.CheckpointException as error:
                raise error.failures[0][0] from None  # of rank 0, the only one; torch wraps whatever it meets


class _Planner(dcp.DefaultSavePlanner):
    """Contents are made when they are written."""

    def __init__(self, make: Callable[[str], Tensor | io.BytesIO]):
        super().__init__(flatten_state_dict=False)
        self._make = make

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._make(write_item.index.fqn)


def is_in(name: str, part: Part) -> bool:
    """Whether a tensor is of a part."""
    return part == "pair" or not name.startswith(AUXILIARY)


def normalized(weights: Sequence[float], count: int) -> list[float]:
    """Shares that sum to 1 of `count` checkpoints; equal ones where there are no weights.

    Raises UserError for another number of weights, and for any that is not positive.
    """
    if not weights:
        return [1 / count] * count
    problems = [
        f"--weights: {weight:g} is not positive and finite; leave that checkpoint out"
        for weight in weights
        if not 0 < weight < math.inf
    ]
    if len(weights) != count:
        problems.append(f"--weights: {len(weights)} numbers for {count} checkpoints; give as many")
    if problems:
        raise UserError(problems)
    shares = [weight / max(weights) for weight in weights]  # first, as large ones have an infinite sum
    if least := [weight for weight, share in zip(weights, shares, strict=True) if not share]:
        raise UserError(f"--weights: {least[0]:g} is nothing beside {max(weights):g}; leave that checkpoint out")
    total = math.fsum(shares)
    return [share / total for share in shares]


def newest(run: Path, count: int) -> list[Path]:
    """The last `count` complete checkpoints of a run folder, from old to new. Raises UserError if it has fewer."""
    found = sorted(folder for folder in run.glob("iter_*") if folder.name[5:].isdigit())
    if len(found) < count:
        raise UserError(
            f"--last {count}: {run} has {len(found)} checkpoints; ask for fewer, or train with a higher "
            "checkpoint.keep_last"
        )
    return found[-count:]


def average_facts(folder: Path) -> dict[str, object]:
    """What a model card says of an average; nothing of any other checkpoint."""
    record = read_average(folder)
    if not record:
        return {}
    facts: dict[str, object] = {"average of": f"{len(record['sources'])} checkpoints, {PARTS[record['part']]}"}
    for number, one in enumerate(record["sources"], start=1):
        facts[f"source {number}"] = (
            f"{one['checkpoint']} of {one['run']} (seed {one['seed']}), weight {one['weight']:.6g}, "
            f"SHA-256 of {INTEGRITY} {one['integrity_sha256']}"
        )
    if record["differing_options"]:
        facts["differ between sources (below: the last one's)"] = ", ".join(record["differing_options"])
    return facts


def _differences(first: Source, other: Source, part: Part) -> list[str]:
    ours, theirs = first.facts(part), other.facts(part)
    return [
        f"{other.model.folder}: {name} is {theirs.get(name, 'missing')}, in {first.model.folder} "
        f"{ours.get(name, 'missing')}"
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]


def _differing_options(configs: Sequence[Config]) -> list[str]:
    flat = [flatten(config) for config in configs]
    return [name for name in flat[0] if any(one[name] != flat[0][name] for one in flat)]
