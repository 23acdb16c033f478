"""Replaced token detection: the loss and its gradient in closed form, the area under the curve against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from metro_megatron.objective.rtd import AUC_BINS, AUC_RANGE, area_under_curve, detection_loss, detection_sums


def test_replaced_token_detection_is_over_real_tokens_with_original_as_label_one() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 9.0]], requires_grad=True)
    is_original = torch.tensor([[True, False], [True, True]])
    is_real = torch.tensor([[True, True], [True, False]])
    loss = detection_loss(logits, is_original, is_real)
    expected = torch.log1p(torch.exp(torch.tensor([-2.0, -1.0, -0.5]))).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    probability = torch.sigmoid(torch.tensor([[2.0, -1.0], [0.5, 9.0]]))
    torch.testing.assert_close(logits.grad, (probability - is_original.float()) * is_real)


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


def test_logits_beyond_the_range_count_in_the_outer_bins() -> None:
    logits = torch.tensor([[-99.0, 99.0, 3.0, 0.5]])
    is_replaced, is_real = torch.tensor([[1, 0, 0, 1]]).bool(), torch.tensor([[1, 1, 0, 1]]).bool()
    sums = detection_sums(logits, is_replaced, is_real, 8)  # bins of width 4
    assert sums["replaced_histogram"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert sums["original_histogram"].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert (int(sums["replaced_found"]), int(sums["original_kept"])) == (1, 1)


def test_histograms_are_numpys() -> None:
    """Of the real tokens of either kind, counted exactly; padding counts nowhere."""
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(64, 9, generator=generator)
    is_replaced, is_real = (torch.rand(64, 9, generator=generator) < share for share in (0.3, 0.8))
    sums = detection_sums(logits, is_replaced, is_real, AUC_BINS)
    for name, chosen in (("original", is_real & ~is_replaced), ("replaced", is_real & is_replaced)):
        inside = logits[chosen].clamp(-AUC_RANGE, AUC_RANGE).numpy()
        wanted, _ = np.histogram(inside, AUC_BINS, (-AUC_RANGE, AUC_RANGE))
        assert sums[f"{name}_histogram"].tolist() == wanted.tolist()
