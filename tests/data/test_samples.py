import numpy as np
import pytest

from metro_megatron.data.samples import SampleRule, build_sample_index, sample_blocks
from metro_megatron.errors import UserError


def spans(index):
    return list(zip(index.shard.tolist(), index.start.tolist(), index.length.tolist(), strict=True))


def greedy_ref(documents, max_content):
    """Samples of one shard, one unit at a time."""
    samples, at = [], 0
    for units in documents:
        pieces = [min(max_content, u - cut) for u in units for cut in range(0, u, max_content)]
        length = 0
        for piece in pieces:
            if length + piece > max_content:
                samples.append((0, at, length))
                at, length = at + length, 0
            length += piece
        if length:
            samples.append((0, at, length))
        at += length
    return samples


def test_whole_units_of_one_document_up_to_the_limit(make_shard):
    shard = make_shard([[3, 4, 2, 5], [9], [1], [6, 4], [6, 5]])
    index = build_sample_index([shard], seq_length=12)
    assert spans(index) == [
        (0, 0, 9), (0, 9, 5), (0, 14, 9), (0, 23, 1), (0, 24, 10), (0, 34, 6), (0, 40, 5),
    ]  # fmt: skip
    assert len(index) == 7
    assert index.num_tokens == 45 + 2 * 7


def test_documents_at_the_edges_of_the_limit(make_shard):
    """With room for 10 tokens: documents of 1, 10 (= seq_length - 2), 11 and 12 tokens in one unit each."""
    index = build_sample_index([make_shard([[1], [10], [11], [12]])], seq_length=12)
    assert index.length.tolist() == [1, 10, 10, 1, 10, 2]


def test_a_long_unit_is_cut_and_its_last_piece_is_a_unit_like_any_other(make_shard):
    index = build_sample_index([make_shard([[4, 23, 5, 3], [20]])], seq_length=12)
    assert spans(index) == [
        (0, 0, 4),
        (0, 4, 10),
        (0, 14, 10),
        (0, 24, 8),
        (0, 32, 3),
        (0, 35, 10),
        (0, 45, 10),
    ]


def test_one_very_long_document(make_shard):
    index = build_sample_index([make_shard([[30] * 20000, [200_000]])], seq_length=512)
    assert index.length[:1176].tolist() == [510] * 1176  # 17 units of 30 a sample
    assert index.length[1176] == 20000 * 30 - 1176 * 510
    assert index.length[1177:].tolist() == [510] * 392 + [200_000 - 392 * 510]
    assert np.array_equal(index.start, np.cumsum(index.length) - index.length)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_greedy_definition_on_random_documents(make_shard, seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, rng.choice([4, 12, 40]), rng.integers(0, 12)).tolist() for _ in range(300)]
    index = build_sample_index([make_shard(documents)], seq_length=17)
    assert spans(index) == greedy_ref(documents, 15)


def test_several_shards_and_types(make_shard):
    shards = [make_shard([[2, 2], [3]]), make_shard([], 1), make_shard([[40]], 2)]
    index = build_sample_index(shards, seq_length=34)
    assert spans(index) == [(0, 0, 4), (0, 4, 3), (2, 0, 32), (2, 32, 8)]
    assert (index.shard.dtype, index.start.dtype, index.length.dtype) == (np.int16, np.int64, np.int32)


def test_validation_split_is_disjoint_complete_by_document_and_of_the_right_share(make_shard):
    shards = [make_shard([[5, 6, 7]] * 4000, number) for number in range(2)]
    parts = {split: build_sample_index(shards, 14, split, validation_fraction=0.1) for split in ("train", "validation")}
    documents = {
        split: set(zip(index.shard.tolist(), (index.start // 18).tolist(), strict=True))
        for split, index in parts.items()
    }
    assert not documents["train"] & documents["validation"]
    assert len(documents["train"] | documents["validation"]) == 8000
    assert abs(len(documents["validation"]) / 8000 - 0.1) < 0.02  # 6 standard deviations
    held_out = [{document for shard, document in documents["validation"] if shard == k} for k in range(2)]
    assert held_out[0] != held_out[1]
    whole = build_sample_index(shards, 14, "all")
    assert sorted(spans(parts["train"]) + spans(parts["validation"])) == spans(whole)
    larger = build_sample_index(shards, 14, "validation", validation_fraction=0.2)
    assert set(spans(parts["validation"])) < set(spans(larger))


@pytest.mark.parametrize("documents", [[], [[]], [[0, 0], []]])
def test_nothing_to_read_is_the_users_problem(make_shard, documents):
    with pytest.raises(UserError, match="no samples in the all split of 1 shards"):
        build_sample_index([make_shard(documents)], seq_length=512)


@pytest.mark.parametrize(("block_documents", "block_units"), [(1, 1), (3, 1000), (1000, 7)])
def test_blocks_change_nothing(make_shard, block_documents, block_units):
    rng = np.random.default_rng(1)
    shards = [make_shard([rng.integers(1, 40, rng.integers(0, 9)).tolist() for _ in range(50)], k) for k in range(2)]
    for rule in (SampleRule(17), SampleRule(17, "train", 0.3), SampleRule(17, "validation", 0.3, "place")):
        blocks = list(sample_blocks(shards, rule, block_documents, block_units))
        found = [(block.shard, start) for block in blocks for start in block.start.tolist()]
        index = build_sample_index(shards, rule.seq_length, rule.split, rule.validation_fraction, rule.held_out_by)
        assert found == list(zip(index.shard.tolist(), index.start.tolist(), strict=True)) and len(blocks) > 3


def test_an_empty_split_names_the_option_to_change(make_shard):
    shard = make_shard([[5]])
    with pytest.raises(UserError, match=r"raise data.validation_fraction \(0.0\)"):
        build_sample_index([shard], 512, "validation", 0.0)
    with pytest.raises(UserError, match=r"lower data.validation_fraction \(1.0\)"):
        build_sample_index([shard], 512, "train", 1.0)


def test_no_room_for_content(make_shard):
    with pytest.raises(UserError, match="data.seq_length is 2; it must be at least 3"):
        build_sample_index([make_shard([[5]])], seq_length=2)
    assert build_sample_index([make_shard([[5]])], seq_length=3).length.tolist() == [1] * 5
