"""Figures on a batch counted by hand, and what the picture and the console get from the terms."""

import numpy as np
import pytest
import torch

from metro_megatron.config.schema import Config, CorruptionConfig, EarlyExitConfig, ObjectiveConfig, TrainConfig
from metro_megatron.data.batch import MicroBatch
from metro_megatron.data.views import View
from metro_megatron.objective.early_exit import ExitDetection
from metro_megatron.objective.figures import COUNTS, counts, figures, panels, weighted
from metro_megatron.objective.rtd import AUC_BINS, ReplacedTokenDetection, detection_sums
from metro_megatron.objective.term import Term
from metro_megatron.objective.terms import ALL, exported_terms, main_terms
from metro_megatron.schedule import Schedule

TERMS = exported_terms(Config())
"""METRO's."""


def view(is_real: torch.Tensor, is_replaced: torch.Tensor, num_masked: int) -> View:
    tokens = torch.full_like(is_real, 7, dtype=torch.int64)
    none = torch.empty(0, dtype=torch.int64)
    index = torch.arange(num_masked)
    micro_batch = MicroBatch(
        tokens,
        tokens,
        tokens,
        is_real,
        index,
        index[:, None].expand(-1, 2),
        none,
        none,
        is_packed=False,
        max_seqlen=4,
        num_samples=1,
    )
    return View(tokens + is_replaced, micro_batch)


def test_figures_of_a_batch_by_hand() -> None:
    """Eight positions, seven real; of two replaced tokens one is found, of five originals four are kept."""
    is_real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    is_replaced = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    logits = torch.tensor([[3.0, -2.0, 1.0, -1.0], [2.0, 0.5, 0.1, -9.0]])
    sums = {
        **counts(view(is_real, is_replaced, num_masked=3)),
        **detection_sums(logits, is_replaced, is_real, AUC_BINS),
        "aux_loss": torch.tensor(9.0),
        "aux_correct": torch.tensor(2),
        "sample_correct": torch.tensor(1),
        "rtd_loss": torch.tensor(1.4),
        "clm_loss": torch.tensor(6.0),
        "clm_correct": torch.tensor(1),
    }
    assert sums.keys() == {name for names in (COUNTS, *(term.sums for term in TERMS)) for name in names}
    expected = {
        "aux_loss": 3.0,
        "rtd_loss": 0.2,
        "clm_loss": 2.0,
        "aux_accuracy": 2 / 3,
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
    assert figures(TERMS, sums) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("source", "main", "is_there"),
    [
        ("none", ["mlm"], False),
        ("none", ["rtd"], True),
        ("uniform", ["rtd"], True),
        ("auxiliary", ["rtd", "mlm"], True),
    ],
)
def test_masked_tokens_are_not_replaced_ones(source: str, main: list[str], is_there: bool) -> None:
    config = Config(corruption=CorruptionConfig(source=source), objective=ObjectiveConfig(main=main))
    terms = exported_terms(config)
    sums = {
        name: torch.ones(size) for names in (COUNTS, *(term.sums for term in terms)) for name, size in names.items()
    }
    assert ("replace_rate" in figures(terms, sums)) == is_there


def test_what_was_not_counted_has_no_figure() -> None:
    sizes = {name: size for names in (COUNTS, *(term.sums for term in TERMS)) for name, size in names.items()}
    result = figures(TERMS, {name: torch.zeros(size) for name, size in sizes.items()})
    assert result.pop("tokens") == 0 and all(np.isnan(list(result.values())))


def test_weights_are_those_of_the_configuration() -> None:
    config = Config(objective=ObjectiveConfig(rtd_weight=30.0, clm_weight=0.5))
    assert weighted(main_terms(config), {"rtd": 0.2, "clm": 3.0}, 0) == 30 * 0.2 + 0.5 * 3
    assert weighted(TERMS, {"aux": 4.0, "rtd": 0.1}, 7) == 4 + 50 * 0.1, "METRO's weights; a missing loss is left out"


def test_a_weight_may_change_over_the_run() -> None:
    """Where an option becomes a schedule, its term's file changes alone."""

    class Rising(ReplacedTokenDetection):
        weight = Schedule.parse("0 -> 50 at 50%")  # type: ignore[assignment]

    rising = Rising(Config(train=TrainConfig(train_steps=100)))
    assert [weighted([rising], {"rtd": 2.0}, step) for step in (0, 24, 49, 99)] == [2.0, 50.0, 100.0, 100.0]


def test_panels_of_one_title_are_one() -> None:
    shown = {panel.title: panel for panel in panels(map(type, TERMS))}
    assert shown["language modeling accuracy"].curves == {"aux_accuracy": "MLM", "clm_accuracy": "CLM"}
    assert len(shown) == 6 and "replace rate" in shown


@pytest.mark.parametrize("term", ALL)
def test_every_curve_is_fed_by_a_figure(term: type[Term]) -> None:
    config = Config(early_exit=EarlyExitConfig(layers=[1]))
    one = ExitDetection(config, 1) if term is ExitDetection else term(config)
    drawn = {name for panel in panels([term]) for name in panel.curves}
    sizes = {name: size for names in (COUNTS, one.sums) for name, size in names.items()}
    assert drawn <= figures([one], {name: torch.zeros(size) for name, size in sizes.items()}).keys()
