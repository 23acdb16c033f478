"""Main fills its own masks: a head on one of its layers proposes, and no other model is there.

The study of what a generator is needed for (adaptive early exit for ELECTRA, recipe of ours: the paper's abstract says
no more than that it was made).
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.transformer.module import MegatronModule

from metro_megatron.config.schema import Config
from metro_megatron.corruption.trained import TrainedModel, dropping
from metro_megatron.data.batch import MicroBatch
from metro_megatron.model.encoder import MainModel, TiedParameters
from metro_megatron.model.heads import Decoding
from metro_megatron.parallel.layout import Layout


class MainLayers(TrainedModel):
    """Main's layers up to corruption.main_layer read the masked text, and a head behind them names the originals.

    The gradients of its loss go into those layers and main's embedding, beside those of phase 2; the head is this
    corruptor's own. All of main must be on this rank, as without a pipeline. The pass is not recomputed. Dropout is as
    model.auxiliary_dropout says, from masks of its own.
    """

    def __init__(self, config: Config, layout: Layout, tied: TiedParameters, main: MainModel):
        super().__init__(config, layout)
        self.main = main
        self.num_layers = config.proposing_layers
        self.head = self.term.head(tied.config)

    @property
    def trained(self) -> Mapping[str, MegatronModule]:
        assert isinstance(self.head, MegatronModule)
        return {self.term.name: self.head}

    def read(self, micro_batch: MicroBatch, drops: bool) -> Decoding:
        with dropping(self.main, drops and self.config.model.auxiliary_dropout != "zero"):
            hidden = self.main.read_masked(micro_batch, self.num_layers)
        return self.head(hidden, micro_batch, self.main.word)
