"""Position schemes: published starts of buckets, T5's and COCO-LM's numbering, the reset of [CLS], TUPE's term."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from metro_megatron import mcore
from metro_megatron.config.position import CocoBuckets, PositionScheme, T5Buckets
from metro_megatron.config.schema import ModelConfig
from metro_megatron.hf.export import metro_config
from metro_megatron.hf.positions_metro import relative_buckets
from metro_megatron.model.init import initialize
from metro_megatron.model.position import Positions
from metro_megatron.parallel.layout import Layout
from tests.distributed import run_ranks
from tests.parity.small_run import small_config

STARTS = {
    ("t5", 32, 128): [*range(9), 12, 16, 23, 32, 46, 64, 91],
    ("coco", 32, 128): [*range(10), 12, 18, 27, 39, 58, 86],
    ("t5", 64, 128): [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113],
    ("coco", 64, 128): [*range(18), 19, 22, 25, 28, 32, 37, 43, 49, 56, 64, 74, 84, 97, 111],
}
"""First distance of every bucket of one side."""
LAST_STARTS = {("t5", 128, 256): 240, ("coco", 128, 256): 239, ("t5", 512, 512): 507, ("coco", 512, 512): 506}
BUCKETS = {"t5": T5Buckets, "coco": CocoBuckets}


def starts(kind: str, count: int, max_distance: int) -> list[int]:
    """Of keys before the query."""
    buckets = BUCKETS[kind](count, max_distance)
    rows = [buckets.row(-distance, 512) for distance in range(512)]
    return [0, *(distance for distance in range(1, 512) if rows[distance] != rows[distance - 1])]


@pytest.mark.parametrize("setting", STARTS)
def test_bucket_starts(setting: tuple[str, int, int]) -> None:
    assert starts(*setting) == STARTS[setting]


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (64, 128), (128, 256), (512, 512)])
def test_t5_buckets_are_those_of_transformers(buckets: int, max_distance: int) -> None:
    """Of an encoder's bidirectional attention, for every distance that 512 positions have."""
    relative = torch.arange(-511, 512)
    wanted = T5Attention._relative_position_bucket(relative, True, buckets, max_distance).tolist()
    assert [T5Buckets(buckets, max_distance).row(distance, 512) for distance in relative.tolist()] == wanted


@pytest.mark.parametrize("setting", LAST_STARTS)
def test_last_bucket_starts(setting: tuple[str, int, int]) -> None:
    assert starts(*setting)[-1] == LAST_STARTS[setting]


def whole_table(scheme: PositionScheme) -> Tensor:
    """Row of the table for every (query, key), [S, S], from what a scheme says of distances and of [CLS]."""
    rows = torch.tensor(scheme.distance_rows())
    position = torch.arange(scheme.positions)
    relative = (position[None, :] - position[:, None]).clamp(-scheme.reach, scheme.reach)
    table = rows[relative + scheme.reach]
    if scheme.resets_cls:
        table[0], table[1:, 0] = scheme.cls_rows()
    return table


@pytest.mark.parametrize("kind", ["coco", "t5"])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (64, 128), (128, 256), (512, 512)])
def test_table_uses_every_row_once_it_resets_cls(kind: str, buckets: int, max_distance: int) -> None:
    model_config = ModelConfig(
        relative_bucket=kind,  # type: ignore[arg-type]
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
    )
    table = whole_table(model_config.position_scheme)
    inner = table[1:, 1:]
    unused = buckets - 1 if kind == "coco" else buckets // 2
    assert unused not in inner and buckets not in inner
    distinct = inner.unique()
    assert distinct.min() == 0 and distinct.max() < buckets and len(distinct) <= buckets - 1
    assert (table[0] == unused).all() and (table[1:, 0] == buckets).all()
    for offset in (-511, -200, -3, 0, 5, 300):  # only the distance counts
        assert len(inner.diagonal(offset).unique()) <= 1
    later, earlier = inner[0, 1:], inner[1:, 0]
    assert not set(later.tolist()) & set(earlier.tolist())
    assert torch.equal(table, relative_buckets(metro_config(model_config), 512, torch.device("cpu")))


def test_shorter_samples_read_the_corner_of_the_full_table() -> None:
    """COCO-LM's shift is the minimum over the whole table, -255 at 512/512, not that of a short one."""
    assert CocoBuckets(512, 512).row(0, 512) == 255


@pytest.mark.parametrize("kind", ["coco", "t5"])
def test_without_a_reset_cls_is_a_token_like_others(kind: str) -> None:
    reset = ModelConfig(relative_bucket=kind).position_scheme  # type: ignore[arg-type]
    plain = ModelConfig(relative_bucket=kind, reset_cls=False).position_scheme  # type: ignore[arg-type]
    assert (reset.num_rows, plain.num_rows) == (65, 64) and plain.cls_rows() == []
    table = whole_table(plain)
    assert torch.equal(table[1:, 1:], whole_table(reset)[1:, 1:])
    assert torch.equal(table[0, :-1], table[1, 1:]) and torch.equal(table[:-1, 0], table[1:, 1])
    config = metro_config(ModelConfig(relative_bucket=kind, reset_cls=False))  # type: ignore[arg-type]
    assert torch.equal(table, relative_buckets(config, 512, torch.device("cpu")))


@pytest.mark.parametrize(
    ("scheme", "named"),
    [
        (PositionScheme(512, CocoBuckets(33, 128)), ["num_buckets is 33, must be even; use 34"]),
        (PositionScheme(512, CocoBuckets(64, 17)), ["max_distance is 17, must be greater than 17"]),
        (PositionScheme(512, CocoBuckets(64, 18)), []),
        (PositionScheme(512, T5Buckets(64, 16)), ["max_distance is 16, must be greater than 16"]),
        (PositionScheme(512, T5Buckets(64, 17)), []),
        (PositionScheme(512, None), []),
        (PositionScheme(512, None, starts_decaying=True), ["init is decay, but model.relative_bucket none leaves no"]),
    ],
)
def test_problems_are_named(scheme: PositionScheme, named: list[str]) -> None:
    found = list(scheme.problems())
    assert len(found) == len(named)
    assert all(part in problem for part, problem in zip(named, found, strict=True))


def tupe(scheme: PositionScheme, parameters: dict[str, Tensor], heads: int, length: int) -> Tensor:
    """The untied term pair by pair, as the paper writes it: [heads, length, length]."""
    rows = torch.nn.functional.layer_norm(
        parameters["untied.position.weight"],
        parameters["untied.norm.weight"].shape,
        parameters["untied.norm.weight"],
        parameters["untied.norm.bias"],
        1e-5,
    )
    q, k = (
        rows @ parameters[f"untied.{name}.weight"].T + parameters[f"untied.{name}.bias"] for name in ("query", "key")
    )
    width = q.size(1) // heads
    term = torch.zeros(heads, length, length)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(length):
            for j in range(length):
                one, other = (i + 1, j + 1) if scheme.resets_cls else (i, j)
                if scheme.resets_cls and i == 0:
                    one = other = 0
                elif scheme.resets_cls and j == 0:
                    one = other = 1
                term[head, i, j] = q[one, part] @ k[other, part] / (2 * width) ** 0.5
    return term


def of_parameters(scheme: PositionScheme) -> dict[str, Any]:
    """On every rank: what this rank's heads add, the parameters and their gradients, and shapes in a checkpoint."""
    config = small_config(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True})
    layout = Layout.create(config.parallel, torch.device("cpu"))
    positions = Positions(mcore.auxiliary_config(config, layout.device), scheme, layout.tensor)
    initialize(positions, "t.", config.model, 1, layout.tensor)
    for name, parameter in positions.named_parameters():
        if "bias" in name:  # zeros would hide mistakes
            parameter.data += torch.linspace(-1, 1, parameter.numel())
    assert positions.bias() is None
    term = positions.term(5)
    assert term is not None
    weight = torch.arange(term.numel()).view(term.shape).cos()
    (term * weight).sum().backward()
    found: dict[str, Any] = {"term": term.detach(), "weight": weight}
    for name, parameter in positions.named_parameters():
        assert parameter.grad is not None
        found |= {name: parameter.detach(), f"{name} grad": parameter.grad}
    with_table = Positions(positions.config, replace(scheme, buckets=CocoBuckets(16, 32)), layout.tensor)
    sharded = with_table.sharded_state_dict("t.", (), {"dp_cp_group": layout.data})
    found["shapes"] = {name: one.global_shape for name, one in sharded.items() if isinstance(one, ShardedTensor)}
    layout.destroy()
    return found


@pytest.mark.parametrize("resets_cls", [True, False])
def test_untied_term_equals_tupe_on_two_ranks(resets_cls: bool) -> None:
    """Heads are split; position table and norm are replicas with the whole gradient, sequence parallelism or not."""
    scheme = PositionScheme(64, None, resets_cls=resets_cls, is_untied=True)
    ranks = run_ranks(of_parameters, 2, scheme)
    names = [name.removesuffix(" grad") for name in ranks[0] if name.endswith(" grad")]
    split = [name for name in names if "query" in name or "key" in name]
    whole = {
        name: torch.cat([rank[name] for rank in ranks]) if name.removesuffix(" grad") in split else ranks[0][name]
        for name in (*names, *(f"{name} grad" for name in names))
    }
    parameters = {name: whole[name].requires_grad_() for name in names}
    shapes = {f"t.{name}": tuple(whole[name].shape) for name in names}
    assert ranks[0]["shapes"] == shapes | {"t.weight": (16 + resets_cls, 4)}
    term = tupe(scheme, parameters, heads=4, length=5)
    torch.testing.assert_close(torch.cat([rank["term"] for rank in ranks]), term, atol=1e-5, rtol=1e-5)
    (term * torch.cat([rank["weight"] for rank in ranks])).sum().backward()
    for name in names:
        torch.testing.assert_close(whole[f"{name} grad"], parameters[name].grad, atol=1e-5, rtol=1e-4, msg=name)
