import numpy as np
import pytest

from metro_megatron.data.masking import Cells, Masking
from metro_megatron.data.order import Draws
from metro_megatron.randomness import Purpose, extend64, hash64
from metro_megatron.vocabulary import MASK_ID, NUM_SPECIALS, SpecialIds

MASKING = Masking(seed=1, probability=0.15)


def draws_of(num_samples, epoch=0):
    return Draws(np.full(num_samples, epoch, dtype=np.int64), np.arange(num_samples, dtype=np.int64))


def test_count_at_512_tokens_is_76_or_77():
    """recipe: floor(0.15 * 512 + u) = floor(76.8 + u)."""
    counts = MASKING.counts(draws_of(100_000), np.full(100_000, 510))
    assert sorted(set(counts.tolist())) == [76, 77]
    assert abs((counts == 77).mean() - 0.8) < 0.0076  # 6 standard deviations


@pytest.mark.parametrize("length", [1, 2, 3, 8, 18, 98, 509])
def test_mean_count_is_exactly_the_probability(length):
    wanted = 0.15 * (length + 2)
    counts = MASKING.counts(draws_of(100_000), np.full(100_000, length))
    assert set(counts.tolist()) <= {int(wanted), int(wanted) + 1}
    assert abs(counts.mean() - wanted) < 6 * 0.5 / np.sqrt(100_000)


def test_count_never_exceeds_the_content():
    counts = Masking(1, 0.9).counts(draws_of(1000), np.full(1000, 1))
    assert set(counts.tolist()) == {1}
    assert Masking(1, 0.0).counts(draws_of(1000), np.full(1000, 510)).sum() == 0


def test_positions_are_the_smallest_hashes_of_the_content():
    lengths = np.random.default_rng(0).integers(1, 200, 300)
    draws = draws_of(300, epoch=2)
    place, position = MASKING.positions(draws, lengths)
    counts = MASKING.counts(draws, lengths)
    expected = []
    for sample, length in enumerate(lengths.tolist()):
        by_hash = sorted(range(1, length + 1), key=lambda p: int(hash64(1, 3, 2, sample, p)))
        expected += [(sample, p) for p in sorted(by_hash[: counts[sample]])]
    assert list(zip(place.tolist(), position.tolist(), strict=True)) == expected


def test_specials_are_never_masked_and_content_is_masked_evenly():
    lengths = np.full(20_000, 18)
    _, position = MASKING.positions(draws_of(20_000), lengths)
    hits = np.bincount(position, minlength=20)
    assert hits[0] == hits[19] == 0
    assert abs(hits[1:19] / 20_000 - 3 / 18).max() < 6 * np.sqrt(1 / 6 * 5 / 6 / 20_000)


def test_masks_do_not_depend_on_the_samples_around():
    lengths = np.random.default_rng(1).integers(1, 511, 400)
    draws = draws_of(400)
    place, position = MASKING.positions(draws, lengths)
    keys = MASKING.noise_keys(draws[place], position)
    chosen = np.random.default_rng(2).permutation(400)[:37]
    some_place, some_position = MASKING.positions(draws[chosen], lengths[chosen])
    some_keys = MASKING.noise_keys(draws[chosen][some_place], some_position)
    for number, sample in enumerate(chosen):
        assert np.array_equal(some_position[some_place == number], position[place == sample])
        assert np.array_equal(some_keys[some_place == number], keys[place == sample])


def test_masks_change_with_epoch_and_seed():
    lengths = np.full(50, 510)
    positions = [
        MASKING.positions(draws_of(50), lengths)[1],
        MASKING.positions(draws_of(50, epoch=1), lengths)[1],
        Masking(2, 0.15).positions(draws_of(50), lengths)[1],
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        shared = len(set(positions[one][:76].tolist()) & set(positions[other][:76].tolist()))
        assert shared < 30  # 11 expected


def test_noise_keys_are_the_halves_of_the_hash():
    draws = Draws(np.array([0, 3]), np.array([5, 7]))
    keys = MASKING.noise_keys(draws, np.array([2, 510]))
    assert keys.dtype == np.int32 and keys.shape == (2, 2)
    halves = keys.view(np.uint32).astype(object)
    expected = [int(hash64(1, 4, 0, 5, 2)), int(hash64(1, 4, 3, 7, 510))]
    assert [int(high) << 32 | int(low) for high, low in halves] == expected


def test_no_samples():
    place, position = MASKING.positions(draws_of(0), np.empty(0, np.int32))
    assert place.shape == position.shape == (0,)
    assert MASKING.noise_keys(draws_of(0), position).shape == (0, 2)


def test_shares_of_what_is_read_at_masked_positions():
    """BERT's 80/10/10: chi-square of the three kinds, and of the random ids, against what is asked for."""
    lengths = np.full(2_000, 510)
    masking = Masking(1, 0.15, keep_probability=0.1, random_probability=0.2, vocab_size=105)
    drawn, position = masking.positions(draws_of(2_000), lengths)
    tokens = np.full(len(drawn), 1_000)  # no random id is equal
    read = masking.readings(draws_of(2_000)[drawn], position, tokens)
    kept, hidden, random = read == tokens, read == MASK_ID, read[(read != tokens) & (read != MASK_ID)]
    observed = np.array([kept.sum(), len(random), hidden.sum()])
    expected = len(drawn) * np.array([0.1, 0.2, 0.7])
    assert ((observed - expected) ** 2 / expected).sum() < 18.4  # 2 degrees of freedom: probability 1e-4
    counts = np.bincount(random, minlength=105)
    assert counts[:NUM_SPECIALS].sum() == 0 and len(counts) == 105
    assert ((counts[NUM_SPECIALS:] - len(random) / 100) ** 2 / (len(random) / 100)).sum() < 160  # 99 degrees
    kept_before = kept[:-1][drawn[1:] == drawn[:-1]]
    assert abs(kept_before[kept[1:][drawn[1:] == drawn[:-1]]].mean() - 0.1) < 0.02, "neighbours are independent"


def test_what_is_read_is_a_function_of_the_place_and_leaves_the_masks_alone():
    lengths = np.full(50, 510)
    masking = Masking(1, 0.15, keep_probability=0.1, random_probability=0.1, vocab_size=300)
    drawn, position = masking.positions(draws_of(50), lengths)
    assert np.array_equal(position, MASKING.positions(draws_of(50), lengths)[1])
    tokens = 5 + position % 295
    read = masking.readings(draws_of(50)[drawn], position, tokens)
    some = np.random.default_rng(3).permutation(len(drawn))[:99]
    assert np.array_equal(masking.readings(draws_of(50)[drawn[some]], position[some], tokens[some]), read[some])
    other = masking.readings(draws_of(50, epoch=1)[drawn], position, tokens)
    assert 0.5 < (read == other).mean() < 0.9
    assert (MASKING.readings(draws_of(50)[drawn], position, tokens) == MASK_ID).all()
    for keep, expected in ((1.0, tokens), (0.0, np.full_like(tokens, MASK_ID))):
        found = Masking(1, 0.15, keep, 0.0, 300).readings(draws_of(50)[drawn], position, tokens)
        assert np.array_equal(found, expected)


BERTS = SpecialIds(bos=101, pad=0, eos=102, mask=103, others=(100, 199))


def cells_of(contents: list[np.ndarray]) -> Cells:
    """Samples of these contents, one after another."""
    whole = [np.concatenate([[101], content, [102]]) for content in contents]
    return Cells(np.concatenate(whole), np.cumsum([0, *map(len, whole)])[:-1])


def test_special_ids_in_the_text_are_masked_last_and_never_put_at_random():
    generator = np.random.default_rng(4)
    contents = [generator.choice([5, 100, 120, 199], size) for size in generator.integers(1, 60, 200)]
    contents.append(np.full(30, 100))
    lengths, draws = np.array(list(map(len, contents))), draws_of(len(contents))
    masking = Masking(5, 0.3, 0.1, 0.5, 200, BERTS)
    place, position = masking.positions(draws, lengths, cells_of(contents))
    counts = masking.counts(draws, lengths)
    assert np.bincount(place, minlength=len(contents)).tolist() == counts.tolist(), "as many as without special ids"
    chosen = [contents[one][at - 1] for one, at in zip(place, position, strict=True)]
    plain = [int((~np.isin(content, BERTS.others)).sum()) for content in contents]
    is_special = np.isin(chosen, BERTS.others)
    assert np.bincount(place, is_special, len(contents)).tolist() == np.maximum(counts - plain, 0).tolist()
    tokens = np.full(20_000, 5)
    read = masking.readings(draws_of(20_000), np.ones(20_000, int), tokens)
    random = read[(read != 103) & (read != 5)]
    assert set(random) == set(range(200)) - {0, 5, 100, 101, 102, 103, 199}
    without = Masking(5, 0.3)
    ordinary = [np.full(len(content), 7) for content in contents]
    for one, other in zip(
        without.positions(draws, lengths), without.positions(draws, lengths, cells_of(ordinary)), strict=True
    ):
        assert one.tolist() == other.tolist(), "without any the hashes alone decide"


def test_whole_words_are_masked_whole_in_the_order_of_their_hashes():
    """Against a plain loop over words; a share so small that long words do not fit."""
    generator = np.random.default_rng(6)
    starts = generator.random(200) < 0.5
    contents = [generator.integers(110, 190, size) for size in generator.integers(1, 80, 150)]
    lengths, draws = np.array(list(map(len, contents))), draws_of(len(contents))
    masking = Masking(5, 0.15, special_ids=BERTS, word_starts=starts)
    place, position = masking.positions(draws, lengths, cells_of(contents))
    counts = masking.counts(draws, lengths)
    all_of_it = Masking(5, 1.0).positions(draws, lengths)
    assert len(all_of_it[0]) == lengths.sum()
    states = hash64(5, Purpose.MASK, draws.epoch, draws.sample)
    found = 0
    for sample, content in enumerate(contents):
        words: list[list[int]] = []
        for at, token in enumerate(content, start=1):
            if not words or starts[token]:
                words.append([])
            words[-1].append(at)
        words.sort(key=lambda word: int(extend64(states[sample : sample + 1], np.array([word[0]], np.uint64))[0]))
        left, expected = counts[sample], []
        for word in words:
            if len(word) <= left:
                left -= len(word)
                expected += word
        assert position[place == sample].tolist() == sorted(expected)
        found += len(expected)
    assert 0.8 * counts.sum() < found < counts.sum() and np.all(np.diff(place) >= 0)
