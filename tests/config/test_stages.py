"""A layout of layers is read as megatron-core reads it, and what it would misread is refused."""

import pytest
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from metro_megatron.config.stages import layers_of_layout
from metro_megatron.errors import UserError


@pytest.mark.parametrize("layout", ["EtL", "Ettt|tL", "Et*3|(tt|)*29t,tL", "E(tt|t|)*2,t*12L", "Et|*2tL", "(Et|)*1tL"])
def test_layers_are_megatrons(layout: str) -> None:
    chunks = PipelineParallelLayerLayout.parse_str_to_list(layout)
    if all(LayerType.decoder in chunk for chunk in chunks):
        assert layers_of_layout(layout) == [chunk.count(LayerType.decoder) for chunk in chunks]
    else:
        with pytest.raises(UserError, match="a chunk has one layer or more"):
            layers_of_layout(layout)


@pytest.mark.parametrize(
    "layout", ["", "tt|tt", "Ett||ttL", "EttL|tt", "Ett|ttLL", "Ett|mL", "Ett;ttL", "E(tt|ttL", "Et*9999L"]
)
def test_no_layout_is_refused(layout: str) -> None:
    with pytest.raises(UserError, match="is no layout of layers"):
        layers_of_layout(layout)
