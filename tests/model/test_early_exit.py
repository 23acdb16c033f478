"""Layers that update some rows against layers that update all, both orders of norms; and FLOPs counted by torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from metro_megatron.config.early_exit import Exits
from metro_megatron.data.views import View
from metro_megatron.model.early_exit import ActiveRows
from metro_megatron.model.encoder import Reading
from metro_megatron.model.layer import LOCAL
from metro_megatron.model.sequences import Sequences
from metro_megatron.parallel.layout import Layout
from metro_megatron.plan.flops import layer_flops, main_flops
from metro_megatron.train.build import Parts
from tests.distributed import run_ranks
from tests.model.test_layer import CONFIG, LENGTHS, LONGEST, RELATIVE, Named, build, of_block, sequences
from tests.parity.small_run import small_config, small_corpus

ROWS = LONGEST * len(LENGTHS)
ACTIVE = torch.arange(ROWS) % 5 < 3
FILLED = 2
"""Rows that are computed for nothing: capacity beyond the active ones."""


def rows(is_active: Tensor, filled: int, given: Sequences) -> ActiveRows:
    order = torch.cat([is_active.nonzero()[:, 0], (~is_active).nonzero()[:, 0]])
    index, rest = order.tensor_split([int(is_active.sum()) + filled])
    keys = given.dropout
    assert keys is not None
    return ActiveRows(index, rest, is_active, type(keys)(keys.seeds, keys.samples, keys.rows[index]))


def layers(layout: Layout, norms_first: bool, is_active: Tensor | None, filled: int, gathers: bool) -> Named:
    """Output and gradients of two layers, the second of which updates the active rows alone."""
    block, positions = build(layout, LOCAL, RELATIVE, norms_first)
    given = sequences(with_dropout=True)
    if is_active is not None and gathers:
        given.active[1] = rows(is_active, filled, given)
    elif is_active is not None:
        keeps = is_active.view(LONGEST, -1, 1)
        last = block.layers[1]
        last.register_forward_hook(
            lambda layer, args, kwargs, output: (torch.where(keeps, output[0], kwargs["hidden_states"]), None),
            with_kwargs=True,
        )
    return of_block(block, positions, given)


def compare() -> list[tuple[Named, Named, Named, Named]]:
    """On a lone rank, for both orders: gathered and masked, then gathered with all rows and plain."""
    layout = Layout.create(CONFIG.parallel, torch.device("cpu"))
    everyone = torch.ones(ROWS, dtype=torch.bool)
    found = [
        (
            layers(layout, norms_first, ACTIVE, FILLED, gathers=True),
            layers(layout, norms_first, ACTIVE, FILLED, gathers=False),
            layers(layout, norms_first, everyone, 0, gathers=True),
            layers(layout, norms_first, None, 0, gathers=False),
        )
        for norms_first in (False, True)
    ]
    layout.destroy()
    return found


def test_gathered_rows_are_what_the_whole_layer_says_of_them() -> None:
    """Outputs and every gradient, with dropout; with a capacity of all rows bit for bit the plain layer's."""
    (found,) = run_ranks(compare, 1)
    for gathered, masked, everyone, plain in found:
        assert gathered.keys() == masked.keys() == everyone.keys() == plain.keys()
        for name, value in masked.items():
            torch.testing.assert_close(gathered[name], value, rtol=1e-10, atol=1e-10, msg=name)
            assert torch.equal(everyone[name], plain[name]), name
        assert not torch.equal(masked["output"], plain["output"])


MODEL = {"num_layers": 6, "relative_attention_max_distance": 48}
EXITS = Exits((2, 4), 0.55)


def counted() -> tuple[list[float], list[float]]:
    """On a lone rank: torch's counts of forward and backward without and with exits, and what is predicted."""
    config = small_config(
        model=MODEL, early_exit={"layers": list(EXITS.layers)}, data={"row_format": "padded", "micro_batch_size": 4}
    )
    layout = Layout.create(config.parallel, torch.device("cpu"))
    parts = Parts.build(config, layout)
    (main,) = parts.pair.main
    micro_batch = small_corpus(config).training_data(layout).step_batch(0, 0).micro_batches[0]
    counts = []
    for exits in (None, EXITS):

        def judge(name: str, reading: Reading) -> Tensor:
            return reading.heads[name].logits.sum()

        with FlopCounterMode(display=False) as counter:
            view = View(micro_batch.tokens, micro_batch, exits=exits)
            main(view, judge if exits else None).heads["rtd"].sum().backward()
        counts.append(float(counter.get_total_flops()))
    layout.destroy()
    scheme, rows = config.model.position_scheme, micro_batch.tokens.numel()
    squares = rows * micro_batch.tokens.size(1)  # on the CPU attention multiplies padding too
    # The biases and the head behind the last layer are not part of the prediction.
    table = 2 * (2 * scheme.reach + 3) * scheme.num_rows * config.model.num_attention_heads
    beside = 2 * table + 3 * 2 * config.model.hidden_size * rows
    predicted = [3 * main_flops(config.model, exits, rows, squares) + beside for exits in (None, EXITS)]
    return counts, predicted


def test_counted_flops_are_those_predicted() -> None:
    ((counts, predicted),) = run_ranks(counted, 1)
    assert counts == predicted
    assert counts[1] < 0.85 * counts[0]


def test_shares_and_capacities() -> None:
    """Exits take as many each; whatever the lengths, the samples' tokens fit into the capacity."""
    exits = Exits((2, 5, 6), 0.6)
    shares = [exits.staying(layer) / 2**16 for layer in range(8)]
    assert shares == pytest.approx([1, 1, 0.8, 0.8, 0.8, 0.6, 0.4, 0.4], abs=1e-5)
    assert [exits.updated(1000, layer) for layer in (1, 2, 3, 6, 7)] == [1000, 1000, 800, 600, 400]
    for layer in (2, 5, 6):
        for lengths in ([1] * 90, [3, 7, 61], [10] * 9, [512, 511]):
            kept = sum(length * exits.staying(layer) // 2**16 for length in lengths)
            assert kept <= exits.updated(sum(lengths), layer + 1)
    hidden, inner = 64, 256
    assert layer_flops(hidden, inner, 10, 10, 100) == 24 * hidden**2 * 10 + 4 * hidden * 100
    assert math.isclose(layer_flops(hidden, inner, 10, 0, 100), 4 * hidden**2 * 10 + 4 * hidden * 100)
