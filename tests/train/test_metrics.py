"""Figures on a batch counted by hand, and the area under the curve against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from metro_megatron.data.batch import MicroBatch
from metro_megatron.train.metrics import (
    AUC_BINS,
    AUC_RANGE,
    SUMS,
    area_under_curve,
    auxiliary_sums,
    figures,
    main_sums,
)


def micro_batch(is_real: torch.Tensor) -> MicroBatch:
    empty = torch.zeros_like(is_real, dtype=torch.int64)
    none = torch.empty(0, dtype=torch.int64)
    return MicroBatch(empty, empty, empty, is_real, none, none, none, none, is_packed=False, max_seqlen=4)


def test_figures_of_a_batch_by_hand() -> None:
    """Eight places, seven real; of two replaced tokens one is found, of five originals four are kept."""
    is_real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    is_replaced = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    logits = torch.tensor([[3.0, -2.0, 1.0, -1.0], [2.0, 0.5, 0.1, -9.0]])
    sums = main_sums(torch.tensor(1.4), torch.tensor(6.0), logits.t(), is_replaced.t(), micro_batch(is_real))
    sums |= auxiliary_sums(torch.tensor(9.0), torch.tensor([7, 8, 9]), torch.tensor([7, 1, 2]), torch.tensor([7, 8, 1]))
    sums["clm_correct"] = torch.tensor(1)
    assert sums.keys() == SUMS.keys()
    result = figures(sums)
    expected = {
        "aux_loss": 3.0,
        "rtd_loss": 0.2,
        "clm_loss": 2.0,
        "mlm_accuracy": 2 / 3,
        "sampled_accuracy": 1 / 3,
        "clm_accuracy": 1 / 3,
        "replace_rate": 2 / 7,
        "replace_accuracy": 1 / 2,
        "non_replace_accuracy": 4 / 5,
        "rtd_precision": 1 / 2,
        "rtd_auc": 0.8,
        "non_pad_fraction": 7 / 8,
        "tokens": 7.0,
    }
    assert result == pytest.approx(expected, rel=1e-6)


def test_a_step_without_masks_has_figures() -> None:
    zeros = {name: torch.zeros(size) for name, size in SUMS.items()}
    result = figures(zeros)
    assert all(np.isfinite(list(result.values()))) and result["rtd_auc"] == 0.5


def test_area_under_curve_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    original, replaced = rng.normal(1.0, 2.0, 5000), rng.normal(0.0, 2.0, 900)
    edges = np.linspace(-AUC_RANGE, AUC_RANGE, AUC_BINS + 1)
    histograms = [torch.from_numpy(np.histogram(part, edges)[0].astype(float)) for part in (original, replaced)]
    labels = np.r_[np.ones(5000), np.zeros(900)]
    expected = roc_auc_score(labels, np.r_[original, replaced])
    assert area_under_curve(*histograms) == pytest.approx(expected, abs=1e-3)
    width = 2 * AUC_RANGE / AUC_BINS
    binned = np.floor(np.r_[original, replaced] / width)  # ties included, the two agree exactly
    assert area_under_curve(*histograms) == pytest.approx(roc_auc_score(labels, binned), abs=1e-12)
