"""The whole of what is trained, as one rank holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron.core.transformer.module import MegatronModule

from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.model.encoder import MainModel
from metro_megatron.model.init import initialize
from metro_megatron.parallel.layout import Layout

TIED = "tied"
"""Name of the shared module that both phases use."""


@dataclass(frozen=True)
class Pair:
    """The modules that every pipeline rank uses, and main as one chunk per virtual pipeline stage of this rank."""

    shared: Mapping[str, MegatronModule]
    """By name: TIED, and what trains in phase 1 only, such as the auxiliary model."""
    main: list[MainModel]

    def modules(self) -> Iterator[tuple[str, MegatronModule]]:
        """(prefix of global names, module) of everything that has parameters, each once."""
        for name, module in self.shared.items():
            yield f"{name}.", module
        for chunk in self.main:
            yield "main.", chunk

    def named(self) -> Iterator[tuple[str, MegatronModule]]:
        """(a name of its own, module), in the same order."""
        yield from self.shared.items()
        for number, chunk in enumerate(self.main):
            yield f"main{number}", chunk

    def initialize(self, config: Config, layout: Layout) -> None:
        """Give every parameter its initial value, on the layout's device and in the run's precision."""
        for prefix, module in self.modules():
            initialize(module, prefix, config.model, config.train.seed, layout.tensor)
            module.to(device=layout.device, dtype=mcore.DTYPES[config.train.precision])
