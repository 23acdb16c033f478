"""docs/adding.md adds a loss in one file: its text is taken from the page, trained, and compared with plain torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional

from metro_megatron.config.schema import Config
from metro_megatron.data.views import View
from metro_megatron.objective.figures import panels
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.objective.term import Term
from metro_megatron.train import build
from metro_megatron.train.metrics import MetricSums
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"


def focal_correction() -> type[Term]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names["FocalCorrection"]


def two_steps(config: Config) -> tuple[list[dict[str, float]], float, set[str]]:
    """Figures of two steps, the first one's loss in plain torch, and the names of main's heads."""
    with patch.object(build, "main_terms", lambda config: [focal_correction()(config)]):
        trainer = start(config)
    trainer.homes.fetch_parameters()
    metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    expected = 0.0
    if trainer.layout.world.size() == 1:
        for tokens, micro_batch in zip(trainer.step.evaluate(batch, metrics), batch.micro_batches, strict=True):
            with torch.no_grad():
                logits = trainer.pair.main[0](View(tokens, micro_batch)).heads["focal"].logits()
            losses = functional.cross_entropy(
                logits[:, : config.model.vocab_size], micro_batch.masked_targets, reduction="none"
            )
            expected += float(((1 - (-losses).exp()) * losses).sum())
        metrics.reduce()
    figures = []
    for step in range(2):
        trainer.step.train(
            trainer.corpus.training_data(trainer.layout).step_batch(step, trainer.progress.seen_samples), metrics
        )
        trainer.progress.seen_samples = batch.end
        figures.append(metrics.reduce())
    heads = {name for chunk in trainer.pair.main for name, _ in chunk.named_children() if name.endswith("_head")}
    trainer.close()
    return figures, expected / batch.num_masked, heads


def test_the_page_s_loss_trains_in_every_layout() -> None:
    (one,) = run_ranks(two_steps, 1, small_config())
    figures, expected, heads = one
    assert heads == {"focal_head"}, "without detection there is no head for it"
    assert figures[0]["focal_loss"] == pytest.approx(expected, rel=1e-5)
    assert {"focal_accuracy", "aux_loss"} <= figures[0].keys() and "rtd_loss" not in figures[0]
    staged = run_ranks(two_steps, 2, small_config(parallel={"pipeline_model_parallel_size": 2}))
    for other, _, _ in staged:
        for found, wanted in zip(other, figures, strict=True):
            assert found["focal_loss"] == pytest.approx(wanted["focal_loss"], rel=1e-6)


def test_the_picture_shows_it() -> None:
    shown = {name for panel in panels([MaskedLanguageModel, focal_correction()]) for name in panel.curves}
    assert "focal_loss" in shown and "rtd_loss" not in shown
