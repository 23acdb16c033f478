"""Corruption without a model: every word as likely, or as likely as it is frequent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from metro_megatron.config.schema import Config, CorruptionConfig, ModelConfig
from metro_megatron.corruption.uniform import Uniform
from metro_megatron.corruption.unigram import Unigram, unigram_weights
from metro_megatron.errors import UserError
from metro_megatron.vocabulary import NUM_SPECIALS
from tests.corruption.sources import run

VOCAB_SIZE, DRAWS = 40, 10**6
CPU = torch.device("cpu")


def config_of(**corruption: object) -> Config:
    return Config(model=ModelConfig(vocab_size=VOCAB_SIZE), corruption=CorruptionConfig(**corruption))


def noise_keys() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(-(2**31), 2**31, (DRAWS, 2), generator=generator).int()


def passes(drawn: Tensor, wanted: np.ndarray) -> None:
    """Chi-square of draws against probabilities [V]; what has none is never drawn."""
    counts = drawn.bincount(minlength=VOCAB_SIZE).numpy()
    assert counts[wanted == 0].sum() == 0
    expected = DRAWS * wanted / wanted.sum()
    assert stats.chisquare(counts[wanted > 0], expected[wanted > 0]).pvalue > 0.001


def without(wanted: np.ndarray, target: int) -> np.ndarray:
    return np.where(np.arange(VOCAB_SIZE) == target, 0.0, wanted)


def test_uniform_draws_every_word_as_often_and_never_a_forbidden_one() -> None:
    corruptor, keys = Uniform(config_of(source="uniform")), noise_keys()
    words = np.where(np.arange(VOCAB_SIZE) < NUM_SPECIALS, 0.0, 1.0)
    passes(corruptor.draw(keys, None), words)
    for target in (NUM_SPECIALS, 17, VOCAB_SIZE - 1):
        passes(corruptor.draw(keys, torch.full((DRAWS,), target)), without(words, target))


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_unigram_draws_words_as_often_as_their_frequency_to_the_power(power: float) -> None:
    counts = np.random.default_rng(1).integers(1, 10**9, VOCAB_SIZE)
    counts[[9, 20]] = 0, 1
    wanted = np.where(counts > 0, counts.astype(float) ** power, 0.0)
    wanted[:NUM_SPECIALS] = 0.0
    keys = noise_keys()
    corruptor = Unigram(config_of(source="unigram", unigram_power=power), counts, CPU)
    passes(corruptor.draw(keys, None), wanted)
    for target in (NUM_SPECIALS, 9, VOCAB_SIZE - 1):
        passes(corruptor.draw(keys, torch.full((DRAWS,), target)), without(wanted, target))


def test_rare_words_keep_their_weight() -> None:
    counts = np.full(VOCAB_SIZE, 10**12)
    counts[7] = 1
    weights = unigram_weights(counts, 1.0)
    assert weights[:NUM_SPECIALS].sum() == 0 and weights.sum() <= 2**52
    assert weights[7] / weights.sum() == pytest.approx(1 / (1 + 10**12 * (VOCAB_SIZE - NUM_SPECIALS - 1)), rel=0.01)


def test_a_single_word_is_refused() -> None:
    counts = np.zeros(VOCAB_SIZE, np.int64)
    counts[[1, 8]] = 5
    with pytest.raises(UserError, match="fewer than two words"):
        Unigram(config_of(source="unigram"), counts, CPU)


def test_a_run_needs_no_auxiliary_model(tmp_path) -> None:
    config = replace(Config(), corruption=CorruptionConfig(source="unigram", disallow_correct=True))
    found = run(config.corruption, index_cache=str(tmp_path))
    assert found.modules == ["tied"] and found.trained == {"tied", "main"}
    assert not any(name.startswith("aux.") for name in found.weights)
    assert found.changed == [1.0] * len(found.changed)
    assert found.figures[-1]["rtd_loss"] < 0.9 * found.figures[0]["rtd_loss"], "such noise is easily told"
    assert "aux_loss" not in found.figures[0]
    assert len(list(tmp_path.glob("*.counts.json"))) == 1
