"""Early exit in numbers: how many tokens each main layer still updates, and what that costs.

Legend: S positions, B rows, H hidden, F inner width, R = S B rows of hidden states, L tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metro_megatron.config.schema import ModelConfig

LEVELS = 2**16
"""Shares that leave are cut to 2^-16, so that the tokens that stay are counted in whole numbers everywhere."""


@dataclass(frozen=True)
class Exits:
    """Where tokens leave the main encoder in one step, and how many."""

    layers: tuple[int, ...]
    """Main layers (from 1), ascending, behind which tokens leave."""
    share: float
    """Of a sample's tokens, those that have left behind the last of them; each of the exits takes as many."""

    def staying(self, layer: int) -> int:
        """Of LEVELS parts of a sample, those that go on behind main layer `layer`, from 0, the embedding, on."""
        passed = sum(one <= layer for one in self.layers)
        return LEVELS - int(self.share * passed / len(self.layers) * LEVELS)

    def updated(self, rows: int, layer: int) -> int:
        """Of R rows, those that main layer `layer` (from 1) computes: its capacity.

        A sample of L tokens keeps floor(L staying / LEVELS) of them, so that those of all samples fit in.
        """
        return rows * self.staying(layer - 1) // LEVELS


def layer_flops(hidden: int, inner: int, rows: int, updated: int, squares: float) -> float:
    """Forward matrix FLOPs of a layer that updates some of its rows; forward and backward are 3 times as many.

    A row that is updated takes 8 H^2 + 4 H F; one that has left 4 H^2, its keys and values; attention 4 H times
    squares, the sum of L^2 over the samples, whoever has left.
    """
    return updated * (8 * hidden**2 + 4 * hidden * inner) + (rows - updated) * 4 * hidden**2 + 4 * hidden * squares


def main_flops(model: ModelConfig, exits: Exits | None, rows: int, squares: float) -> float:
    """Forward matrix FLOPs of all main layers and of the exits' heads, 2 H a row and exit; no exits: full depth."""
    hidden, inner, layers = model.hidden_size, model.ffn_hidden_size, range(1, model.num_layers + 1)
    if exits is None:
        return len(layers) * layer_flops(hidden, inner, rows, rows, squares)
    heads = len(exits.layers) * rows * 2 * hidden
    return heads + sum(layer_flops(hidden, inner, rows, exits.updated(rows, layer), squares) for layer in layers)
