"""METRO's corruption: an auxiliary model that learns to fill masks beside the main model, and fills them."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.transformer.module import MegatronModule

from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.corruption.trained import TrainedModel, dropping
from metro_megatron.data.batch import MicroBatch
from metro_megatron.model.encoder import AuxiliaryModel, TiedParameters
from metro_megatron.model.heads import Decoding
from metro_megatron.parallel.layout import Layout


class TrainedAuxiliary(TrainedModel):
    """An encoder with a head, both its own but for what it borrows.

    That is what both encoders share (model.shared_embeddings, model.shared_lm_bias).
    """

    def __init__(self, config: Config, layout: Layout, tied: TiedParameters):
        super().__init__(config, layout)
        transformer = mcore.auxiliary_config(config, layout.device)
        head, lent = self.term.head(transformer), tied.for_auxiliary()
        self.model = AuxiliaryModel(transformer, config.model, lent, layout.shared_groups, head)

    @property
    def trained(self) -> Mapping[str, MegatronModule]:
        return {self.term.name: self.model}

    def read(self, micro_batch: MicroBatch, drops: bool) -> Decoding:
        with dropping(self.model, drops):
            return self.model(micro_batch)
