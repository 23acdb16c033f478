"""The classifier in closed form against scikit-learn's, and against leaving out one by one."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from metro_megatron.probing.ridge import PENALTIES, ridge_scores


def left_out_error(known: np.ndarray, targets: np.ndarray, penalty: float) -> float:
    """Squared error where each example is predicted by ridge regression of the others, its intercept free."""
    errors = 0.0
    for one in range(len(known)):
        others = np.column_stack([np.ones(len(known) - 1), np.delete(known, one, axis=0)])
        gram = others.T @ others + np.diag([0.0] + [penalty] * known.shape[1])
        weights = np.linalg.solve(gram, others.T @ np.delete(targets, one, axis=0))
        errors += float(((targets[one] - np.r_[1.0, known[one]] @ weights) ** 2).sum())
    return errors


@pytest.mark.parametrize(("count", "width"), [(60, 5), (12, 40)])
def test_scores_are_ridge_regressions_with_the_penalty_of_least_left_out_error(count: int, width: int) -> None:
    rng = np.random.default_rng(count)
    classes = rng.integers(0, 3, count)
    train = rng.normal(size=(count, width)) * 10.0 ** rng.integers(-2, 3, width) + 5
    train[:, 0] += classes * train[:, 0].std()
    train[:, 1] = 7.0
    test = rng.normal(size=(9, width)) + 5
    deviation = train.std(0)
    deviation[1] = 1.0
    known, asked = (train - train.mean(0)) / deviation, (test - train.mean(0)) / deviation
    targets = np.eye(3)[classes]
    values = np.linalg.svd(known, compute_uv=False) ** 2
    unit = values[values > 1e-9 * values[0]].mean()
    errors = [left_out_error(known, targets, penalty * unit) for penalty in PENALTIES]
    best = PENALTIES[int(np.argmin(errors))] * unit
    expected = Ridge(alpha=best).fit(known, targets).predict(asked)
    np.testing.assert_allclose(ridge_scores(train, classes, test, 3), expected, atol=1e-8)


def test_features_that_say_nothing_give_the_shares_of_the_classes() -> None:
    scores = ridge_scores(np.ones((4, 3)), np.array([0, 1, 1, 1]), np.zeros((2, 3)), 2)
    np.testing.assert_allclose(scores, [[0.25, 0.75]] * 2)
