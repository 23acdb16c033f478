"""Floating point operations of main's layers where tokens leave early.

Legend: H hidden, F inner width, R rows of hidden states, L tokens of a sample.
"""

from __future__ import annotations

from metro_megatron.config.early_exit import Exits
from metro_megatron.config.schema import ModelConfig


def layer_flops(hidden: int, inner: int, rows: int, updated: int, squares: float) -> float:
    """Forward matrix FLOPs of a layer that updates some of its rows; forward and backward are 3 times as many.

    A row that is updated takes 8 H^2 + 4 H F; one that has left 4 H^2, its keys and values; attention 4 H times
    squares, the sum of L^2 over the samples, whoever has left.
    """
    return updated * (8 * hidden**2 + 4 * hidden * inner) + (rows - updated) * 4 * hidden**2 + 4 * hidden * squares


def main_flops(model: ModelConfig, exits: Exits | None, rows: int, squares: float) -> float:
    """Forward matrix FLOPs of all main layers and of detection at the exits; no exits: full depth."""
    hidden, inner, layers = model.hidden_size, model.ffn_hidden_size, range(1, model.num_layers + 1)
    if exits is None:
        return len(layers) * layer_flops(hidden, inner, rows, rows, squares)
    head = 2 * hidden + (2 * hidden**2 if model.rtd_head == "dense" else 0)
    heads = len(exits.layers) * rows * head
    return heads + sum(layer_flops(hidden, inner, rows, exits.updated(rows, layer), squares) for layer in layers)
