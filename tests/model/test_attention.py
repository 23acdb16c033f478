"""The attention slot: positions reach the scores, [CLS] reset or not, with TUPE's term, packed as padded."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused.attention import packed_samples, padded_samples
from metro_megatron import mcore
from metro_megatron.config.position import PositionScheme
from metro_megatron.model.attention import CoreAttention
from metro_megatron.model.position import Positions
from metro_megatron.model.sequences import Sequences, sites_of_layer
from metro_megatron.parallel.layout import Layout
from tests.distributed import run_ranks
from tests.parity.small_run import small_config

CONFIG = small_config()
RELATIVE = CONFIG.model.position_scheme
SCHEMES = {
    "coco": RELATIVE,
    "coco, not reset": replace(RELATIVE, resets_cls=False),
    "t5": small_config(model={"relative_bucket": "t5"}).model.position_scheme,
    "none": replace(RELATIVE, buckets=None),
    "TUPE": replace(RELATIVE, is_untied=True),
    "TUPE, absolute": replace(RELATIVE, buckets=None, is_untied=True),
    "TUPE, not reset": replace(RELATIVE, is_untied=True, resets_cls=False),
}
LENGTHS = (7, 20, 1)


def added(scheme: PositionScheme, positions: Positions, length: int) -> Tensor:
    """What the scheme adds to every (head, query, key), read off the table cell by cell."""
    total = torch.zeros(4, length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(length):
            if scheme.buckets is not None:
                row = scheme.buckets.row(j - i, scheme.positions)
                if scheme.resets_cls and j == 0:
                    row = scheme.buckets.count
                if scheme.resets_cls and i == 0:
                    row = scheme.buckets.unused
                total[:, i, j] += positions.weight[row]
    term = positions.term(length)  # its own test: test_position
    return total if term is None else total + term


def wanted(scheme: PositionScheme, positions: Positions, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[L, N, K] of one sample."""
    width = q.size(2) * (2 if scheme.is_untied else 1)
    scores = torch.einsum("inc,jnc->nij", q, k) / width**0.5 + added(scheme, positions, len(q))
    return torch.einsum("nij,jnc->inc", scores.softmax(-1), v)


def of_all(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a sum over out."""
    out.sin().sum().backward(retain_graph=True)
    found = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    for leaf in leaves:
        leaf.grad = None
    return found


def run_schemes() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """On a lone rank: (got, wanted) outputs and gradients for every scheme, packed and padded."""
    layout = Layout.create(CONFIG.parallel, torch.device("cpu"))
    config, found = mcore.main_config(CONFIG, layout.device), {}
    generator = torch.Generator().manual_seed(1)
    for name, scheme in SCHEMES.items():
        positions = Positions(config, scheme, layout.tensor).double()
        for parameter in positions.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slot = CoreAttention(config, layer_number=2, pg_collection=layout.stage_groups, attn_mask_type=None)
        assert list(slot.parameters()) == []
        qkv = torch.randn(sum(LENGTHS), 4, 3, 16, generator=generator, dtype=torch.float64).requires_grad_()
        samples = [wanted(scheme, positions, *part.unbind(2)) for part in qkv.split(LENGTHS)]
        entering, added = positions(qkv, max(LENGTHS))
        ends = torch.tensor([0, *LENGTHS]).cumsum(0)
        packed = Sequences(qkv_format="thd", samples=packed_samples(ends, max(LENGTHS)), added=added)
        pairs = [(slot(entering, packed), torch.cat(samples))]
        gradients = [of_all(x, [qkv, *positions.parameters()]) for x in pairs[0]]
        lengths = torch.tensor(LENGTHS)
        padded = Sequences(qkv_format="sbhd", samples=padded_samples(lengths, max(LENGTHS)), added=added)
        rows = torch.nn.utils.rnn.pad_sequence(qkv.split(LENGTHS))  # [S, B, N, 3, K]
        out = slot(rows.flatten(0, 1), padded).view(*rows.shape[:3], -1)
        is_real = torch.arange(max(LENGTHS))[:, None] < lengths
        pairs.append((out[is_real], torch.nn.utils.rnn.pad_sequence(samples)[is_real]))
        pairs += list(zip(*gradients, strict=True))
        found[name] = [(one.detach(), other.detach()) for one, other in pairs]
    layout.destroy()
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[tuple[Tensor, Tensor]]]:
    return run_ranks(run_schemes, 1)[0]


@pytest.mark.parametrize("name", SCHEMES)
def test_positions_reach_the_scores(found: dict[str, list[tuple[Tensor, Tensor]]], name: str) -> None:
    """Against softmax written out in float64; gradients of q, k, v and of all that positions learn."""
    for got, exact in found[name]:
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)
    assert len(found[name]) == 3 + ("none" not in name and "absolute" not in name) + 7 * ("TUPE" in name)


def test_no_two_sites_share_a_seed() -> None:
    sites = [0, *(site for layer in range(1, 5) for site in sites_of_layer(layer))]
    assert sites == list(range(13))
