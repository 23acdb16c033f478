"""Layers against torch's own, against other parts, and against themselves recomputed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.nn import functional

from fused.attention import padded_samples
from metro_megatron import mcore
from metro_megatron.config.position import PositionScheme
from metro_megatron.model.attention import CoreAttention
from metro_megatron.model.layer import LOCAL, LayerParts, block_spec
from metro_megatron.model.position import Positions
from metro_megatron.model.sequences import DropoutKeys, Sequences
from metro_megatron.parallel.layout import Layout
from tests.distributed import run_ranks
from tests.parity.small_run import small_config

CONFIG = small_config(model={"num_layers": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1})
MODEL = CONFIG.model
HEADS, HIDDEN = MODEL.num_attention_heads, MODEL.hidden_size
LENGTHS = torch.tensor([9, 1, 5])
LONGEST = 9
RELATIVE = MODEL.position_scheme
NOTHING = PositionScheme(MODEL.max_position_embeddings, None)
Named = dict[str, Tensor]


class TorchLinear(torch.nn.Linear):
    """megatron-core's signature around torch's layer."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, skip_bias_add: bool, **slot: Any):
        super().__init__(inputs, outputs, bias)
        self.skip_bias_add = skip_bias_add

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        if self.skip_bias_add:
            return functional.linear(x, self.weight), self.bias
        return super().forward(x), None


class TorchNorm(torch.nn.LayerNorm):
    """Our norm's signature around torch's, without dropout."""

    def __init__(self, config: object, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps)

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, x_bias: Tensor | None = None, dropout: None = None
    ) -> Tensor:
        x = x if x_bias is None else x + x_bias
        return super().forward(x if residual is None else x + residual)


TORCH = LayerParts(TorchLinear, TorchLinear, TorchNorm, CoreAttention)


def randomize(module: torch.nn.Module) -> None:
    """By name, so that equal names get equal values; norms and biases too."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def build(
    layout: Layout, parts: LayerParts, scheme: PositionScheme, norms_first: bool, recompute: bool = False
) -> tuple[TransformerBlock, Positions]:
    """Two layers and what they borrow, in float64."""
    parallel = replace(CONFIG.parallel, recompute="full" if recompute else "none")
    config = mcore.main_config(replace(CONFIG, parallel=parallel), layout.device)
    positions = Positions(config, scheme, layout.tensor)
    spec = block_spec(parts, MODEL.num_layers, norms_first)
    block = TransformerBlock(config, spec, pg_collection=layout.stage_groups)
    for module in (block, positions):
        module.double()
        randomize(module)
    return block, positions


def arriving() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [S, B, H], what multiplies the output in the loss, and which keys are padding, [B, S]."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(2, LONGEST, len(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    is_padding = torch.arange(LONGEST) >= LENGTHS[:, None]
    return hidden, weight.masked_fill(is_padding.t()[:, :, None], 0), is_padding


def sequences(with_dropout: bool = False) -> Sequences:
    keys = DropoutKeys(
        torch.arange(7)[:, None].expand(-1, 2).contiguous(),
        torch.arange(len(LENGTHS)) + 5,
        torch.arange(LONGEST * len(LENGTHS)) * 3,
    )
    samples = padded_samples(LENGTHS, LONGEST)
    return Sequences(qkv_format="sbhd", samples=samples, dropout=keys if with_dropout else None)


def show(run: Callable[[Tensor], Tensor], parameters: Named, times: int = 1) -> Named:
    """Output where there are tokens, and all gradients, added up over so many passes."""
    hidden, weight, is_padding = arriving()
    hidden.requires_grad_()
    for _ in range(times):
        out = run(hidden)
        (out * weight).sum().backward()
    found = {"output": out.detach().transpose(0, 1)[~is_padding], "input": hidden.grad}
    found |= {name: parameter.grad for name, parameter in parameters.items()}
    assert all(value is not None for value in found.values())
    return found  # type: ignore[return-value]


def of_block(block: TransformerBlock, positions: Positions, given: Sequences | None = None, times: int = 1) -> Named:
    parameters = dict(block.named_parameters()) | {f"positions.{name}": x for name, x in positions.named_parameters()}
    assert not any("positions" in name for name, _ in block.named_parameters()), "borrowed, not owned"
    given = given or sequences()

    def run(hidden: Tensor) -> Tensor:
        hidden, given.added = positions(hidden, LONGEST)
        return block(hidden_states=hidden, attention_mask=None, packed_seq_params=given)

    return show(run, parameters, times)


def as_torch(named: Named, norms_first: bool) -> Named:
    """Our parameters, or their gradients, under the names of torch.nn.TransformerEncoder."""
    norms = {"input_layernorm": "norm1", "pre_mlp_layernorm": "norm2"}
    linears = {
        "self_attention.linear_proj": "self_attn.out_proj",
        "mlp.linear_fc1": "linear1",
        "mlp.linear_fc2": "linear2",
    }
    result = {}
    for kind in ("weight", "bias"):
        if norms_first:
            result[f"norm.{kind}"] = named[f"final_layernorm.{kind}"]
        for layer in range(MODEL.num_layers):
            for ours, theirs in (norms | linears).items():
                result[f"layers.{layer}.{theirs}.{kind}"] = named[f"layers.{layer}.{ours}.{kind}"]
            mixed = named[f"layers.{layer}.self_attention.linear_qkv.{kind}"]  # q, k and v of a head stand together
            result[f"layers.{layer}.self_attn.in_proj_{kind}"] = (
                mixed.unflatten(0, (HEADS, 3, -1)).transpose(0, 1).flatten(0, 2)
            )
    return result


def against_torch(layout: Layout, norms_first: bool) -> tuple[Named, Named]:
    block, positions = build(layout, LOCAL, NOTHING, norms_first)
    layer = torch.nn.TransformerEncoderLayer(
        HIDDEN, HEADS, MODEL.ffn_hidden_size, 0.0, functional.gelu, MODEL.layer_norm_eps, norm_first=norms_first
    )
    final = torch.nn.LayerNorm(HIDDEN, MODEL.layer_norm_eps) if norms_first else None
    theirs = torch.nn.TransformerEncoder(layer, MODEL.num_layers, final, enable_nested_tensor=False).double()
    theirs.load_state_dict(as_torch(dict(block.named_parameters()), norms_first))
    is_padding = arriving()[2]
    wanted = show(lambda x: theirs(x, src_key_padding_mask=is_padding), dict(theirs.named_parameters()))
    got = of_block(block, positions)
    return {**as_torch(got, norms_first), **{name: got[name] for name in ("output", "input")}}, wanted


def against_other_parts(layout: Layout, norms_first: bool) -> tuple[Named, Named]:
    local, other = (of_block(*build(layout, parts, RELATIVE, norms_first)) for parts in (LOCAL, TORCH))
    return other, local


def against_recomputed(layout: Layout, norms_first: bool) -> tuple[Named, Named]:
    """With dropout, a table, and TUPE's term; gradients of two passes."""
    scheme = replace(RELATIVE, is_untied=True)
    plain, recomputed = (
        of_block(*build(layout, LOCAL, scheme, norms_first, recompute), sequences(with_dropout=True), times=2)
        for recompute in (False, True)
    )
    return recomputed, plain


COMPARISONS = (against_torch, against_other_parts, against_recomputed)
Found = dict[tuple[str, bool], tuple[Named, Named]]


def compare() -> Found:
    """On a lone rank: everything, since a process is slow to start."""
    layout = Layout.create(CONFIG.parallel, torch.device("cpu"))
    found = {
        (one.__name__, norms_first): one(layout, norms_first) for one in COMPARISONS for norms_first in (False, True)
    }
    layout.destroy()
    return found


@pytest.fixture(scope="module")
def found() -> Found:
    return run_ranks(compare, 1)[0]


@pytest.mark.parametrize("norms_first", [False, True])
@pytest.mark.parametrize("comparison", [one.__name__ for one in COMPARISONS])
def test_outputs_and_gradients_are_equal(found: Found, comparison: str, norms_first: bool) -> None:
    """In float64, so that nothing but rounding is left."""
    got, wanted = found[comparison, norms_first]
    assert got.keys() == wanted.keys()
    assert ("final_layernorm.weight" in wanted or "norm.weight" in wanted) == norms_first
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=name)
        assert value.abs().max() > 1e-6 or name.endswith("in_proj_bias") or "qkv.bias" in name, name
