"""The seat of corruption: what else may stand there than the sources that there are."""

from __future__ import annotations

from unittest.mock import patch

import torch

from metro_megatron.config.schema import Config, CorruptionConfig
from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.train import build
from metro_megatron.vocabulary import MASK_ID
from tests.corruption.sources import Run, record, source_config
from tests.distributed import run_ranks
from tests.parity.small_run import start


class Mask(Corruptor):
    """<mask> stays: main is a masked language model in one phase."""

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        return Proposal(torch.full_like(micro_batch.masked_targets, MASK_ID), {})


def train_with_masks(config: Config) -> Run:
    with patch.object(build, "build_corruptor", lambda *parts: Mask()):
        trainer = start(config)
    return record(trainer)


def test_masks_that_stay_are_one_encoder_in_one_phase() -> None:
    found = run_ranks(train_with_masks, 1, source_config(CorruptionConfig()))[0]
    assert found.is_masked_text and found.modules == ["tied"]
    assert found.changed == [1.0] * len(found.changed)
    assert found.figures[-1]["rtd_loss"] < 0.5 * found.figures[0]["rtd_loss"], "<mask> gives itself away"
