"""The whole of what is trained, as one rank holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.model.encoder import AuxiliaryModel, MainModel, TiedParameters
from metro_megatron.model.init import initialize
from metro_megatron.parallel.groups import shared_groups, stage_groups
from metro_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class Pair:
    """Auxiliary and main model; main as one chunk per virtual pipeline stage of this rank."""

    tied: TiedParameters
    auxiliary: AuxiliaryModel
    main: list[MainModel]
    auxiliary_config: TransformerConfig
    main_config: TransformerConfig

    @classmethod
    def build(cls, config: Config, layout: Layout) -> Pair:
        """Build this rank's part with initial weights, on the layout's device and in the run's precision."""
        auxiliary_config = mcore.auxiliary_config(config, layout.device)
        main_config = mcore.main_config(config, layout.device)
        shared, stage = shared_groups(layout), stage_groups(layout)
        tied = TiedParameters(auxiliary_config, config.model, shared)
        chunks = config.parallel.virtual_pipeline_model_parallel_size
        stages = [None] if chunks == 1 else list(range(chunks))
        pair = cls(
            tied,
            AuxiliaryModel(auxiliary_config, config.model, tied, shared),
            [MainModel(main_config, config.model, tied, stage, vp_stage) for vp_stage in stages],
            auxiliary_config,
            main_config,
        )
        for prefix, module in pair.modules():
            initialize(module, prefix, config.model, config.train.seed, layout.tensor)
            module.to(device=layout.device, dtype=mcore.DTYPES[config.train.precision])
        return pair

    def modules(self) -> Iterator[tuple[str, MegatronModule]]:
        """(prefix of global names, module) of everything that has parameters, each once."""
        yield "tied.", self.tied
        yield "aux.", self.auxiliary
        for chunk in self.main:
            yield "main.", chunk
