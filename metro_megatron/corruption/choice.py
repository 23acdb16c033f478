"""Which corruptor a run has: the one place where they are listed."""

from __future__ import annotations

from metro_megatron.config.schema import Config
from metro_megatron.corruption.auxiliary import TrainedAuxiliary
from metro_megatron.corruption.corruptor import Corruptor
from metro_megatron.model.encoder import TiedParameters
from metro_megatron.parallel.layout import Layout


def build_corruptor(config: Config, layout: Layout, tied: TiedParameters) -> Corruptor:
    """The corruptor of a run; tied is what it may borrow."""
    return TrainedAuxiliary(config, layout, tied)
