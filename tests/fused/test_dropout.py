import pytest
import torch

from fused.dispatch import jit, tl
from fused.dropout import check_dropout, drop_threshold, keep_mask, keep_mask_kernel, keep_scale, philox

CPU = torch.device("cpu")


def signed(low: int, high: int) -> torch.Tensor:
    word = high << 32 | low
    return torch.tensor([word - 2**64 if word >= 2**63 else word])


ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    "key, counter, wanted",
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES), (ONES, ONES, ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_equal_the_published_ones(key, counter, wanted):
    """The known answers of the authors' library, Random123."""
    assert tuple(int(word) for word in philox(signed(*key), *counter)) == wanted


@jit
def uniform_kernel(Out, seed, COUNT: tl.constexpr):
    tl.store(Out + tl.arange(0, COUNT), tl.rand(seed, tl.arange(0, COUNT)))


def test_words_are_those_of_tritons_generator():
    out = torch.empty(4)
    uniform_kernel[(1,)](out, 123, COUNT=4)
    torch.testing.assert_close(out[:3], torch.tensor([0.133895, 0.720701, 0.344585]), atol=1e-6, rtol=0)
    word = philox(torch.tensor([123]), torch.arange(4))[0]
    folded = torch.where(word < 2**31, word, 2**32 - 1 - word)
    torch.testing.assert_close(out, (folded * 4.6566127342e-10).float())


@jit
def mask_kernel(Out, Seed, c3, threshold, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    group = tl.arange(0, GROUPS)[None, :] + rows * 0
    mask = keep_mask_kernel(tl.load(Seed), group, rows, -7, c3, threshold)
    tl.store(Out + rows * GROUPS * 8 + tl.arange(0, GROUPS * 8)[None, :], mask)


@pytest.mark.parametrize("seed", [0, 2**40 + 5, -3])
def test_kernel_and_torch_draw_one_mask(seed):
    threshold, seed = drop_threshold(0.3), torch.tensor([seed])
    out = torch.empty(4, 64, dtype=torch.bool)
    mask_kernel[(1,)](out, seed, 2**31 - 1, threshold, ROWS=4, GROUPS=8)
    rows = torch.arange(4)
    assert torch.equal(out, keep_mask(seed, threshold, 64, rows, -7, 2**31 - 1))
    assert torch.equal(out[:, :13], keep_mask(seed, threshold, 13, rows, -7, 2**31 - 1))
    assert not torch.equal(out, keep_mask(seed + 1, threshold, 64, rows, -7, 2**31 - 1))


def test_every_bit_of_a_draw_is_used_evenly():
    """Each of the 8 elements of a group keeps its share, neighbours are independent, seeds and rows differ."""
    mask = keep_mask(torch.tensor([1]), drop_threshold(0.25), 800, torch.arange(500)).double()
    deviation = (0.25 * 0.75 / 50_000) ** 0.5
    assert ((mask.view(-1, 8).mean(0) - 0.75).abs() < 4 * deviation).all()
    pairs = (mask[:, :-1] * mask[:, 1:]).mean()
    assert abs(float(pairs) - 0.75**2) < 4 * (0.25 / 400_000) ** 0.5


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.1, 1 / 3, 0.5, 0.999999])
def test_kept_elements_keep_the_mean(rate):
    threshold = drop_threshold(rate)
    share = 1 - threshold / 2**16
    assert abs(share - (1 - rate)) <= 2**-16
    assert share * keep_scale(threshold) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    "rate, seed, message",
    [
        (1.0, torch.tensor([3]), "dropout is 1.0"),
        (-0.1, torch.tensor([3]), "dropout is -0.1"),
        (float("nan"), torch.tensor([3]), "dropout is nan"),
        (0.1, torch.tensor(3), r"seed is \[\] torch.int64"),
        (0.1, torch.tensor([3.0]), r"seed is \[1\] torch.float32"),
        (0.1, torch.empty(1, dtype=torch.int64, device="meta"), "on meta"),
    ],
)
def test_bad_input_is_named(rate, seed, message):
    with pytest.raises(ValueError, match=message):
        check_dropout(rate, seed, CPU)
