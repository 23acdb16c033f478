"""What a run says first: where it runs, with what, and on what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fused.dispatch import describe
from metro_megatron.config.schema import Config
from metro_megatron.mcore import implementations
from metro_megatron.parallel.layout import Layout
from metro_megatron.train.corpus import Corpus

if TYPE_CHECKING:
    from metro_megatron.train.initial_weights import InitialWeights


def opening_lines(config: Config, layout: Layout, corpus: Corpus, initial: InitialWeights | None) -> Iterator[str]:
    """One line for each of them, and warnings of the data."""
    yield (
        f"{layout.world.size()} processes on {layout.device.type} (tensor {layout.tensor.size()}, pipeline "
        f"{layout.pipeline.size()}, data {layout.data.size()}), {config.train.precision}"
    )
    if missing := corpus.without_checksums:
        yield f"warning: {missing}"
    yield describe(layout.device)
    yield implementations(config, layout.device)
    yield corpus.description
    if advice := corpus.advice:
        yield f"warning: {advice}"
    if initial:
        yield initial.description
