"""Sharing is data: what an encoder borrows it does not own, and its gradients reach the owner."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metro_megatron import mcore
from metro_megatron.config.schema import Config, ParallelConfig
from metro_megatron.data.batch import MicroBatch
from metro_megatron.model.encoder import AuxiliaryModel, TiedParameters
from metro_megatron.model.init import initialize
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.parallel.layout import Layout
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, small_corpus

OWN = {
    "word": "embedding.word.weight",
    "position": "embedding.position.weight",
    "norm": "embedding.norm.weight",
    "table": "table.weight",
    "decoder": "head.decoder.bias",
}
SHARED = {
    "word": "word.weight",
    "position": "position.weight",
    "norm": "norm.weight",
    "table": "main_table.weight",
    "decoder": "decoder.bias",
}
CONFIG = small_config(model={"shared_embeddings": "token_position_norm", "shared_lm_bias": True})
"""A tied module that has all there is to lend."""
Gradients = dict[str, Tensor]


class Pair(nn.Module):
    """Two encoders, the second with what the first one's side lends it."""

    def __init__(self, config: Config, layout: Layout, parts: tuple[str, ...]):
        super().__init__()
        transformer, groups = mcore.auxiliary_config(config, layout.device), layout.shared_groups
        self.tied = TiedParameters(transformer, config.model, groups)
        borrowed = self.tied.lend(*parts)  # type: ignore[arg-type]
        for name in ("first", "second"):
            head = MaskedLanguageModel(config).head(transformer)
            self.add_module(name, AuxiliaryModel(transformer, config.model, borrowed, groups, head))
        for prefix, module in self.named_children():
            initialize(module, f"{prefix}.", config.model, 1, layout.tensor)  # type: ignore[arg-type]


def loss(pair: Pair, name: str, micro_batch: MicroBatch) -> Tensor:
    return pair.get_submodule(name)(micro_batch).logits().square().mean()


def gradients(config: Config, parts: tuple[str, ...]) -> tuple[Gradients, list[Gradients], list[str]]:
    """Of both encoders' losses together, of each by itself, and the names of what they own."""
    layout = Layout.create(ParallelConfig(), torch.device("cpu"))
    micro_batch = small_corpus(config).training_data(layout).step_batch(0, 0).micro_batches[0]
    pair = Pair(config, layout, parts)

    def of(*names: str) -> Gradients:
        pair.zero_grad()
        torch.stack([loss(pair, name, micro_batch) for name in names]).sum().backward()
        return {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}

    result = of("first", "second"), [of("first"), of("second")], [name for name, _ in pair.second.named_parameters()]
    layout.destroy()
    return result


@pytest.mark.parametrize("parts", [("word",), ("word", "table", "decoder"), tuple(OWN), ()])
def test_what_is_lent_gathers_the_gradients_of_both_and_the_rest_is_each_one_s_own(parts: tuple[str, ...]) -> None:
    (found,) = run_ranks(gradients, 1, CONFIG, parts)
    both, (first, second), own = found
    for part in OWN:
        assert (OWN[part] in own) != (part in parts), part
        shared = f"tied.{SHARED[part]}"
        if part in parts:
            assert first[shared].abs().sum() > 0 and second[shared].abs().sum() > 0
            torch.testing.assert_close(both[shared], first[shared] + second[shared], rtol=1e-5, atol=1e-9)
        else:
            assert shared not in both, "nothing reads it"
            assert f"first.{OWN[part]}" in first and f"first.{OWN[part]}" not in second


def outputs(config: Config) -> tuple[Tensor, Tensor]:
    """Logits of an encoder that owns everything, and of one that borrows the very same values."""
    layout = Layout.create(ParallelConfig(), torch.device("cpu"))
    micro_batch = small_corpus(config).training_data(layout).step_batch(0, 0).micro_batches[0]
    owner, borrower = Pair(config, layout, ()), Pair(config, layout, tuple(OWN))
    with torch.no_grad():
        first = owner.first
        for part, name in OWN.items():
            borrower.tied.get_parameter(SHARED[part]).copy_(first.get_parameter(name))
        borrower.tied.norm.bias.copy_(first.embedding.norm.bias)
        borrower.first.load_state_dict(first.state_dict(), strict=False)
        result = owner.first(micro_batch).logits(), borrower.first(micro_batch).logits()
    layout.destroy()
    return result


def test_owned_or_borrowed_the_mathematics_is_the_same() -> None:
    ((owned, borrowed),) = run_ranks(outputs, 1, CONFIG)
    assert torch.equal(owned, borrowed) and owned.abs().sum() > 0


LEVELS: dict[str, tuple[set[str], set[str]]] = {
    "none": ({"word", "table"}, set()),
    "token": ({"word", "table"}, {"word"}),
    "token_position": ({"word", "position", "table"}, {"word", "position"}),
    "token_position_norm": ({"word", "position", "norm", "table"}, {"word", "position", "norm"}),
}
"""What main and the auxiliary model borrow."""


def borrowed_parts(configs: list[Config]) -> list[tuple[set[str], set[str], set[str]]]:
    """What main and the auxiliary borrow, and what the tied module owns."""
    layout, found = Layout.create(ParallelConfig(), torch.device("cpu")), []
    for config in configs:
        transformer = mcore.auxiliary_config(config, layout.device)
        tied = TiedParameters(transformer, config.model, layout.shared_groups)
        lent = (
            {part for part, module in vars(one).items() if module is not None}
            for one in (tied.for_main(), tied.for_auxiliary())
        )
        found.append((*lent, {name for name, _ in tied.named_parameters()}))
    layout.destroy()
    return found


def test_levels_of_sharing() -> None:
    """Nothing is tied that main does not read; a shared bias comes on top of every level."""
    cases = [(level, bias) for level in LEVELS for bias in (False, True)]
    configs = [small_config(model={"shared_embeddings": level, "shared_lm_bias": bias}) for level, bias in cases]
    (found,) = run_ranks(borrowed_parts, 1, configs)
    for (level, bias), (main, auxiliary, owned) in zip(cases, found, strict=True):
        decoder = {"decoder"} if bias else set()
        assert (main, auxiliary) == tuple(parts | decoder for parts in LEVELS[level])
        assert owned - {"norm.bias"} == {SHARED[part] for part in main}
