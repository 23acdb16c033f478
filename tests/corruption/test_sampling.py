"""Samples are exact, keyed by global coordinates, and the same however the vocabulary is split."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import stats

from metro_megatron.corruption.sampling import gumbel_max_sample, gumbel_noise, vocabulary_argmax
from metro_megatron.randomness import hash64
from tests.distributed import run_ranks

NUM_SPECIALS = 5


def keys(count: int, seed: int = 0) -> torch.Tensor:
    """[count, 2] int32 as the loader makes them."""
    words = hash64(seed, np.arange(count, dtype=np.uint64))
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32).reshape(count, 2))


def test_noise_is_standard_gumbel_with_its_upper_tail() -> None:
    noise = gumbel_noise(keys(400), torch.arange(5000, dtype=torch.int32)).numpy()
    assert np.isfinite(noise).all()
    assert stats.kstest(noise[:, ::50].ravel(), "gumbel_r").pvalue > 1e-3
    maxima = noise.max(axis=1) - np.log(5000)  # the maximum of n is Gumbel shifted by log n
    assert stats.kstest(maxima, "gumbel_r").pvalue > 1e-3
    rows = np.corrcoef(noise[:40])
    assert np.abs(rows - np.eye(40)).max() < 0.08


def test_noise_is_golden() -> None:
    noise = gumbel_noise(torch.tensor([[1, 2], [-3, 2**31 - 1]], dtype=torch.int32), torch.tensor([0, 7, 127999]))
    expected = torch.tensor([[-0.454177, 1.463489, 0.026575], [3.498928, -0.428101, 0.066627]])
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-6)


def sample_alone(logits: torch.Tensor, noise_keys: torch.Tensor) -> torch.Tensor:
    """The same by hand in float64."""
    noise = gumbel_noise(noise_keys, torch.arange(logits.size(1), dtype=torch.int32)).double()
    scores = logits.double() + noise
    scores[:, :NUM_SPECIALS] = -torch.inf
    return scores.argmax(-1)


def sample_on_rank(logits: torch.Tensor, noise_keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    group = dist.group.WORLD
    assert group is not None
    own = logits.chunk(group.size(), dim=1)[group.rank()]
    return gumbel_max_sample(own, noise_keys, group, NUM_SPECIALS), vocabulary_argmax(own, group)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_samples_and_argmax_do_not_depend_on_the_split(world_size: int) -> None:
    logits = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)) * 2
    logits[:, 120:] = -torch.inf  # rows that pad the vocabulary
    logits[5] = 0.0  # all equal: the smallest id is the argmax
    noise_keys = keys(64)
    for sampled, best in run_ranks(sample_on_rank, world_size, logits, noise_keys):
        assert torch.equal(sampled, sample_alone(logits, noise_keys))
        assert torch.equal(best, logits.argmax(-1))
        assert sampled.min() >= NUM_SPECIALS and sampled.max() < 120


def frequencies() -> np.ndarray:
    group = dist.group.WORLD
    assert group is not None
    logits = torch.log(torch.tensor([9.0, 9, 9, 9, 9, 1, 2, 3, 4, 10])).expand(40000, 10).contiguous()
    return np.bincount(gumbel_max_sample(logits, keys(40000), group, NUM_SPECIALS).numpy(), minlength=10)


def test_frequencies_are_softmax_without_specials() -> None:
    (counts,) = run_ranks(frequencies, 1)
    assert counts[:NUM_SPECIALS].sum() == 0
    expected = 40000 * np.array([1, 2, 3, 4, 10]) / 20
    assert stats.chisquare(counts[NUM_SPECIALS:], expected).pvalue > 1e-3
