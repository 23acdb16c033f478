"""The texts of a padded batch side by side in fewer rows, for encoders that read such rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from metro_megatron.errors import UserError
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.hf.configuration_metro import MetroConfig


def can_pack(config: PreTrainedConfig) -> bool:
    """Whether the encoder keeps texts of one row apart by their position_ids."""
    return isinstance(config, MetroConfig)


def refuse_packing(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise UserError if a recipe packs, and the encoder cannot."""
    if recipe.batching == "packed" and not can_pack(config):
        raise UserError(
            f"batching is packed, but encoders of type {config.model_type!r} read one text in a row; use length"
        )


def pack_rows(encoder: nn.Module) -> None:
    """From now on the encoder computes batches in rows as long as their longest text, of which each holds several.

    What it is given and returns stays [B, S] and [B, S, H], so that heads see no difference; padding returns 0. Batches
    that this makes no smaller, or whose padding is not on the right, are left as they are.
    """
    layouts: list[_Layout | None] = []

    def pack(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        mask, ids = given.arguments.get("attention_mask"), given.arguments.get("input_ids")
        layout = None if mask is None or ids is None else _Layout.of(mask)
        layouts.append(layout)
        if layout is not None:
            given.arguments |= layout.packed(given.arguments["input_ids"])
        return given.args, given.kwargs

    def unpack(module: nn.Module, args: tuple[Any, ...], output: BaseModelOutput) -> BaseModelOutput:
        layout = layouts.pop()
        hidden: Any = output.last_hidden_state
        return output if layout is None else BaseModelOutput(layout.unpacked(hidden))

    encoder.register_forward_pre_hook(pack, with_kwargs=True)
    encoder.register_forward_hook(unpack)


class _Layout:
    """Where each token of a padded batch lies in packed rows."""

    def __init__(self, lengths: Sequence[int], starts: Sequence[int], num_rows: int, mask: Tensor):
        self.mask = mask.bool()
        self.size = (num_rows, max(lengths))
        slots = torch.arange(mask.size(1), device=mask.device)
        self.positions = slots.expand_as(mask)[self.mask]
        self.where = (torch.tensor(starts, device=mask.device)[:, None] + slots)[self.mask]
        """Index of every token in the flattened packed rows, text by text."""

    @classmethod
    def of(cls, mask: Tensor) -> _Layout | None:
        """Of a mask [B, S], 0 where there is no token; None where rows stay as they are."""
        lengths = mask.sum(1).tolist()
        slots = torch.arange(mask.size(1), device=mask.device)
        if 0 in lengths or not torch.equal(mask.bool(), slots < mask.sum(1, keepdim=True)):
            return None
        starts, num_rows = first_fit(lengths)
        return None if num_rows == len(lengths) else cls(lengths, starts, num_rows, mask)

    def packed(self, ids: Tensor) -> dict[str, Tensor]:
        """What the encoder reads instead of ids [B, S] and their mask."""
        return {
            "input_ids": self._rows(ids[self.mask], int(ids[~self.mask][0])),
            "position_ids": self._rows(self.positions, 0),
            "attention_mask": self._rows(torch.ones_like(self.where), 0),
        }

    def unpacked(self, hidden: Tensor) -> Tensor:
        """Hidden states of packed rows as [B, S, H]."""
        found = hidden.new_zeros(*self.mask.shape, hidden.size(-1))
        return found.masked_scatter(self.mask[..., None], hidden.flatten(0, 1)[self.where])

    def _rows(self, values: Tensor, filler: int) -> Tensor:
        flat = values.new_empty(self.size).fill_(filler).flatten()
        return flat.scatter(0, self.where, values).view(self.size)


def first_fit(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Where texts begin in flattened rows as long as the longest of them, and how many rows: first-fit decreasing."""
    longest = max(lengths)
    starts, left = [0] * len(lengths), list[int]()
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, room in enumerate(left) if room >= lengths[i]), len(left))
        if row == len(left):
            left.append(longest)
        starts[i] = row * longest + longest - left[row]
        left[row] -= lengths[i]
    return starts, len(left)
