"""The weights that a new run begins with, from folders of any kind, checked before anything of the run is built.

A folder is one that tools/convert_checkpoint.py wrote, a run or a checkpoint, or transformers' ELECTRA; a file
is COCO-LM's. All of them become tensors by the names of an exported model, and these the run's, in any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metro_megatron.checkpoint.files import METADATA, TRACKER
from metro_megatron.checkpoint.read import (
    SEGMENTS,
    StoredModel,
    find_iteration,
    find_segments,
    find_tokenizer,
    stored_config,
)
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.hf.cocolm import open_cocolm
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.electra import open_electra, read_segments, write_segments
from metro_megatron.hf.export import exported_model, exported_tensors
from metro_megatron.hf.pretrained import Pretrained, architecture, open_exported
from metro_megatron.hf.stored import LazyTensors, read_json
from metro_megatron.hf.token_ids import other_ids, tokens_of
from metro_megatron.hf.weights import DECODERS, VOCABULARY, TrainerTensors, all_ties, hf_tensors
from metro_megatron.train.more_positions import POSITIONS, with_more_positions

KINDS: dict[str, Callable[[Path], Pretrained]] = {MetroConfig.model_type: open_exported, "electra": open_electra}
"""How a folder with a config.json is opened, by its model_type."""


def open_pretrained(path: Path) -> Pretrained:
    """Raises UserError for what is none of the kinds there are."""
    if path.is_file():
        return open_cocolm(path)
    if any((path / name).is_file() for name in (TRACKER, METADATA)):
        return _open_checkpoint(find_iteration(path))
    kind = read_json(path / "config.json").get("model_type") if (path / "config.json").is_file() else None
    if kind in KINDS:
        return KINDS[kind](path)
    what = f"a model of type {kind}" if kind else "neither a run or checkpoint nor a folder with a config.json"
    raise UserError(
        f"train.initialize_from {path}: {what}; give a folder that tools/convert_checkpoint.py wrote, a run folder or "
        f"checkpoint, the folder of a model of type {' or '.join(KINDS)}, or COCO-LM's .pt file"
    )


def _open_checkpoint(iteration: Path) -> Pretrained:
    config, stored = stored_config(iteration), StoredModel.open(iteration)
    objectives, model_config = config.objective.main, exported_model(config)
    tensors = hf_tensors(exported_tensors(stored.readers, config), model_config, objectives)
    return Pretrained(
        iteration,
        tensors,
        architecture(model_config, objectives),
        find_tokenizer(iteration),
        segments=read_segments(find_segments(iteration)),
        aliases=all_ties(model_config, objectives),
    )


@dataclass(frozen=True)
class InitialWeights:
    """Weights of others, and what of the run starts at random."""

    config: Config
    tokenizer: Path
    """The run's."""
    sources: list[Pretrained]

    @classmethod
    def open(cls, config: Config, tokenizer: Path) -> InitialWeights:
        """Those of train.initialize_from. Raises UserError for what is none of the kinds there are."""
        sources = [open_pretrained(Path(path)) for path in config.train.initialize_from]
        how, scheme = config.train.initialize_positions, config.model.position_scheme
        if how != "same":
            sources = [with_more_positions(source, scheme, how) for source in sources]
        return cls(config, tokenizer, sources)

    @cached_property
    def tensors(self) -> TrainerTensors:
        """By the trainer's global names."""
        fresh = self.config.train.initialize_fresh
        makers = {
            name: maker
            for source in self.sources
            for name, maker in self._in_order(source).items()
            if part_of(name) not in fresh
        }
        return TrainerTensors(LazyTensors(makers), exported_model(self.config), self.config.objective.main)

    @property
    def description(self) -> str:
        """What the run says of them."""
        fresh, unread = self.config.train.initialize_fresh, self._unread
        moments = "no moments are in it"
        if any((source.path / METADATA).is_file() for source in self.sources):
            moments = "its moments stay behind (train.branch_from would take them along)"
        at_random = f"; {', '.join(fresh)} at random" if fresh else ""
        left = f"; not read: {', '.join(unread[:3])}{' and others' if len(unread) > 3 else ''}" if unread else ""
        return (
            f"weights of {self._names}: {len(self.tensors)} tensors{at_random}; {moments}, the optimizer and the data "
            f"begin anew{left}"
        )

    def write_segments(self, run: Path) -> None:
        """Into the run's folder, where exports look for them: those of an ELECTRA, if it is one."""
        kept = {name: tensor for source in self.sources for name, tensor in source.segments.items()}
        if kept:
            write_segments(run / SEGMENTS, kept)

    def refuse_misfits(self) -> None:
        """Raise UserError naming all that keeps the run from beginning with these weights."""
        found = list(self._differences())
        found += [*self._missing(is_same=not found), *self._doubles(), *self._unequal(), *self._tokenizers()]
        if found:
            raise UserError([f"train.initialize_from {self._names}: {one}" for one in found])

    @cached_property
    def _tokens(self) -> list[str | None]:
        """The run's, special ones by the names that `Pretrained.vocabulary` has for them."""
        found, special_ids = tokens_of(self.tokenizer, self.config.model.vocab_size), self.config.model.special_ids
        named = {special_ids.bos: "<s>", special_ids.pad: "<pad>", special_ids.eos: "</s>", special_ids.mask: "<mask>"}
        named |= {number: "<unk>" for number in special_ids.others if found[number] == "[UNK]"}
        return [named.get(number, token) for number, token in enumerate(found)]

    def _has_padding(self, source: Pretrained) -> bool:
        """Whether a source has more rows than the run, all of them of no token."""
        rows, own = source.architecture.get("vocab_size", 0), self.config.model.vocab_size
        return bool(rows > own and source.tokenizer and not any(tokens_of(source.tokenizer, rows)[own:]))

    def _in_order(self, source: Pretrained) -> dict[str, Callable[[], Tensor]]:
        """A source's tensors under all their names, with the rows of a vocabulary in the order of the run's."""
        makers = dict(source.tensors.makers)
        makers |= {name: makers[one] for name, one in source.aliases.items() if one in makers and name not in makers}
        if source.vocabulary:
            row_of = {token: row for row, token in enumerate(source.vocabulary)}
            rows = torch.tensor([row_of.get(token or "", 0) for token in self._tokens])
            makers |= {name: partial(_rows, makers[name], rows) for name in makers if name.endswith(VOCABULARY)}
        elif self._has_padding(source):
            rows = torch.arange(self.config.model.vocab_size)
            makers |= {name: partial(_rows, makers[name], rows) for name in makers if name.endswith(VOCABULARY)}
        return makers

    @property
    def _names(self) -> str:
        return " ".join(str(source.path) for source in self.sources)

    @property
    def _unread(self) -> list[str]:
        left, unread = [name for source in self.sources for name in source.unread], self.tensors.unread
        return left + [name for name in unread if any(name in source.tensors for source in self.sources)]

    def _differences(self) -> Iterator[str]:
        mine, options = self._architecture(), []
        # An option of 0 is main's size, whose own option may have to change.
        main = mine | {name: value for source in self.sources for name, value in source.architecture.items()}
        for source in self.sources:
            for name, value in source.architecture.items():
                base = "hidden_size" if name == "embedding_size" else name.removeprefix("auxiliary_")
                follows = base != name and not getattr(self.config.model, name)
                if name == "vocab_size" and self._has_padding(source):
                    continue
                if name in mine and value != (main.get(base, mine[name]) if follows else mine[name]):
                    shown = f"0, model.{base}" if follows else _written(mine[name])
                    yield f"model.{name} is {shown}, {source.path} has {_written(value)}"
                    if name == POSITIONS and value < mine[name]:
                        yield "train.initialize_positions repeat or interpolate would make rows for the others"
                    options.append(f"--model.{name} {_written(value)}")
        if options:
            yield f"give {' '.join(dict.fromkeys(options))}"

    def _architecture(self) -> dict[str, Any]:
        """Of what does not start at random."""
        fresh, config = set(self.config.train.initialize_fresh), self.config
        own = architecture(exported_model(config), [name for name in config.objective.main if name not in fresh])
        of_main = vars(config.model.main) if "main" in fresh else {}
        return {
            name: value
            for name, value in own.items()
            if name not in of_main and not ("auxiliary" in fresh and name.startswith("auxiliary_"))
        }

    def _doubles(self) -> Iterator[str]:
        seen: set[str] = set()
        for source in self.sources:
            both = sorted(seen & source.tensors.makers.keys())
            if both:
                yield f"{both[0]} stands in two of them; give one of each model"
            seen |= source.tensors.makers.keys()

    def _missing(self, is_same: bool) -> Iterator[str]:
        """is_same: whether a part has no other reason to lack tensors than that the folder is damaged."""
        fresh, tensors = self.config.train.initialize_fresh, self.tensors
        parts = {part_of(origin.target) for origin in tensors.origins.values()}
        has = {part_of(name) for source in self.sources for name in source.tensors}
        if self.config.corruption.source == "main":
            parts.add("auxiliary")  # a head on a layer of main, which no export keeps
            has.discard("auxiliary")
        missing = {part_of(origin.target): name for name, origin in tensors.origins.items() if name not in tensors}
        for part in sorted((missing.keys() | parts - has) - set(fresh)):
            if part in has and is_same:
                yield f"{part} is there, but for {missing[part]}; give another copy"
            elif part not in has:
                yield (
                    f"{part} is not there; add {part} to train.initialize_fresh, and it starts at random, or give a "
                    f"folder that has it{_unless(part)}"
                )
        for part in fresh:
            if part not in parts:
                yield f"train.initialize_fresh names {part}, which the run does not have; leave it out"

    def _unequal(self) -> Iterator[str]:
        model = self.config.model
        for one, other in self.tensors.unequal_ties():
            yield (
                f"{one} and {other} differ, and one tensor cannot be both with model.shared_embeddings "
                f"{model.shared_embeddings}, model.shared_lm_bias {_written(model.shared_lm_bias)}; share less"
            )

    def _tokenizers(self) -> Iterator[str]:
        for source in self.sources:
            without = [token for token in self._tokens if token not in source.vocabulary] if source.vocabulary else []
            if without:
                yield (
                    f"{source.path} has no row for {without[0]!r} and {len(without) - 1} others of the run's "
                    f"{len(self._tokens)} tokens; give a model whose vocabulary has them all"
                )
            if source.tokenizer:
                yield from other_ids(str(source.path), source.tokenizer, self.tokenizer, self.config.model.vocab_size)


def _rows(make: Callable[[], Tensor], rows: Tensor) -> Tensor:
    return make()[rows]


def _written(value: object) -> str:
    """As an option has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def part_of(name: str) -> str:
    """The part, as train.initialize_fresh names it, of a tensor of an exported model; of what encoders may share, that
    of its owner."""
    first = name.split(".")[0]
    return "main" if first == "metro" else first.removesuffix("_head")


def _unless(part: str) -> str:
    return ", or leave it out of objective.main" if part in (*DECODERS, "rtd", "scl") else ""
