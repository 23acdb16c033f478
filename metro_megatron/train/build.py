"""The parts of a run put together: what corrupts, what the main model learns, and the modules of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from metro_megatron import mcore
from metro_megatron.checkpoint.resume import beginning
from metro_megatron.config.schema import Config
from metro_megatron.corruption.auxiliary import TrainedAuxiliary
from metro_megatron.corruption.cached import Cached
from metro_megatron.corruption.corruptor import Corruptor, MaskedText
from metro_megatron.corruption.main import MainLayers
from metro_megatron.corruption.uniform import Uniform
from metro_megatron.corruption.unigram import Unigram
from metro_megatron.errors import UserError
from metro_megatron.model.encoder import TIED, MainModel, Pair, TiedParameters
from metro_megatron.model.init import initialize
from metro_megatron.model.position import IN_FP32
from metro_megatron.objective.term import Term
from metro_megatron.objective.terms import main_terms
from metro_megatron.parallel.layout import Layout
from metro_megatron.plan.stages import chunk_layers
from metro_megatron.train.corpus import Corpus

if TYPE_CHECKING:
    from metro_megatron.train.initial_weights import InitialWeights


@dataclass(frozen=True)
class Parts:
    """This rank's part of a run, with initial weights."""

    pair: Pair
    corruptor: Corruptor
    terms: list[Term]
    """Losses of the main model."""

    @property
    def all_terms(self) -> list[Term]:
        """The corruptor's losses and main's, in the order of the console."""
        return [*self.corruptor.terms, *self.terms]

    @classmethod
    def build(
        cls, config: Config, layout: Layout, corpus: Corpus | None = None, given: Mapping[str, Tensor] | None = None
    ) -> Parts:
        """As the configuration says, on the layout's device and in the run's precision.

        corpus: what the run trains on; None where the parts only take weights, which no corruptor is asked for.
        given: weights by global name of what does not start at random.
        """
        staged = mcore.main_config(config, layout.device, chunk_layers(config))
        tied = TiedParameters(mcore.tied_config(config, layout.device), config.model, layout.shared_groups)
        terms = main_terms(config)
        chunks, lent = config.parallel.virtual_pipeline_model_parallel_size, tied.for_main()
        main = [
            MainModel(staged, config.model, lent, layout.stage_groups, terms, vp_stage)
            for vp_stage in ([None] if chunks == 1 else range(chunks))
        ]
        corruptor = build_corruptor(config, layout, tied, main[0], corpus)
        pair = Pair({TIED: tied, **corruptor.trained}, main)
        for prefix, module in pair.modules():
            initialize(module, prefix, config.model, config.train.seed, layout.tensor, given)
            module.to(device=layout.device)
            to_precision(module, mcore.DTYPES[config.train.precision])
        return cls(pair, corruptor, terms)


def to_precision(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Parameters in the run's format, but for those that a module keeps in FP32. Buffers are as they are made."""
    for parameter in module.parameters():
        if not getattr(parameter, IN_FP32, False):
            parameter.data = parameter.data.to(dtype)


def refuse_mixed_libraries(config: Config, layout: Layout) -> None:
    """Raise UserError, on every rank, where machines differ in what is installed and auto chose differently.

    Layers of two libraries communicate differently, so that tensor-parallel ranks would wait for each other for ever. A
    collective call.
    """
    chosen: list[str] = [""] * layout.world.size()
    dist.all_gather_object(chosen, mcore.whose_layers(config, layout.device), group=layout.world)
    found = {said: [rank for rank, one in enumerate(chosen) if one == said] for said in dict.fromkeys(chosen)}
    if len(found) > 1:
        lines = [f"ranks {', '.join(map(str, ranks[:8]))}: {said}" for said, ranks in found.items()]
        remedy = "install the same on all machines, or set parallel.transformer_impl local"
        raise UserError([*lines, f"machines differ in their libraries; {remedy}"])


def initial_weights(config: Config, tokenizer: Path) -> InitialWeights | None:
    """Those of a run that begins with weights of others; None where it does not, or goes on from a checkpoint.

    tokenizer: the run's. Raises UserError as InitialWeights.open.
    """
    if not config.train.initialize_from or beginning(config) is not None:
        return None
    # Late: other runs do without transformers.
    from metro_megatron.train.initial_weights import InitialWeights

    return InitialWeights.open(config, tokenizer)


def build_corruptor(
    config: Config, layout: Layout, tied: TiedParameters, main: MainModel, corpus: Corpus | None
) -> Corruptor:
    """The corruptor of a run; tied and main's first chunk are what it may borrow. Which ones there are stands here."""
    source = config.corruption.source
    if source == "none":
        return MaskedText()
    if source == "uniform" or (source != "auxiliary" and corpus is None):
        return Uniform(config)
    if source == "unigram":
        assert corpus
        return Unigram(config, corpus.token_counts(), layout.device)
    if source == "main":
        return MainLayers(config, layout, tied, main)
    if source == "cached":
        return Cached()
    if source == "frozen":
        # Late: other runs do without transformers.
        from metro_megatron.corruption.frozen import Frozen
        from metro_megatron.train.frozen_model import FrozenFolder

        return Frozen(config, layout, FrozenFolder(config.corruption.frozen_model).load())
    return TrainedAuxiliary(config, layout, tied)
