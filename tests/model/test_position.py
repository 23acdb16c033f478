"""Relative-position buckets: published starts, T5's and COCO-LM's numbering, the reset of [CLS]."""

import pytest
import torch

from metro_megatron.config.schema import ModelConfig
from metro_megatron.hf.export import metro_config
from metro_megatron.hf.modeling_metro import relative_buckets
from metro_megatron.model.position import bucket_table, coco_bucket, t5_bucket

STARTS = {
    ("t5", 32, 128): [*range(9), 12, 16, 23, 32, 46, 64, 91],
    ("coco", 32, 128): [*range(10), 12, 18, 27, 39, 58, 86],
    ("t5", 64, 128): [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113],
    ("coco", 64, 128): [*range(18), 19, 22, 25, 28, 32, 37, 43, 49, 56, 64, 74, 84, 97, 111],
}
"""First distance of every bucket of one side."""
LAST_STARTS = {("t5", 128, 256): 240, ("coco", 128, 256): 239, ("t5", 512, 512): 507, ("coco", 512, 512): 506}
FUNCTIONS = {"t5": t5_bucket, "coco": coco_bucket}


def starts(kind: str, buckets: int, max_distance: int) -> list[int]:
    side = FUNCTIONS[kind](-torch.arange(512), buckets, max_distance).abs()  # keys before the query
    return [int((side == bucket).nonzero()[0]) for bucket in side.unique()]


@pytest.mark.parametrize("setting", STARTS)
def test_bucket_starts(setting: tuple[str, int, int]) -> None:
    assert starts(*setting) == STARTS[setting]


@pytest.mark.parametrize("setting", LAST_STARTS)
def test_last_bucket_starts(setting: tuple[str, int, int]) -> None:
    assert starts(*setting)[-1] == LAST_STARTS[setting]


@pytest.mark.parametrize("kind", ["coco", "t5"])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (64, 128), (128, 256), (512, 512)])
def test_table_uses_every_row_once_it_resets_cls(kind: str, buckets: int, max_distance: int) -> None:
    model = ModelConfig(
        relative_bucket=kind,  # type: ignore[arg-type]
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
    )
    table = bucket_table(model)
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
    assert torch.equal(table, relative_buckets(metro_config(model), 512, torch.device("cpu")))


def test_shorter_samples_read_the_corner_of_the_full_table() -> None:
    """COCO-LM's shift is the minimum over the whole table, -255 at 512/512, not that of a short one."""
    model = ModelConfig(relative_attention_num_buckets=512, relative_attention_max_distance=512)
    assert bucket_table(model)[64, 64] == 255
