"""Early exit in numbers: how many tokens each main layer still updates.

Legend: S positions, B rows, R = S B rows of hidden states, L tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

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
