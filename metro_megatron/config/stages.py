"""Megatron's way to write which layers each chunk of a pipeline holds."""

import re

from metro_megatron.errors import UserError


def layers_of_layout(layout: str) -> list[int]:
    """Layers of every chunk, from the bottom up, of a layout such as "Ettt|(tt|)*2tL".

    E is the embedding, t a layer, L the losses and their heads, | ends a chunk; (...)*n and t*n repeat, commas mean
    nothing (megatron-core's PipelineParallelLayerLayout). Raises UserError for what is none.
    """
    written = layout.replace(",", "")
    for pattern in (r"\(([^()]+)\)\*(\d{1,3})", r"([a-zA-Z|])\*(\d{1,3})"):
        written = re.sub(pattern, lambda found: found[1] * int(found[2]), written)
    if not re.fullmatch(r"E(t+\|)*t+L", written):
        raise UserError(
            f"{layout} is no layout of layers: E, the first chunk's layers as so many t, |, the next one's, and so on, "
            "then L; a chunk has one layer or more. Ettt|tL gives two chunks 3 layers and 1"
        )
    return [chunk.count("t") for chunk in written.split("|")]
