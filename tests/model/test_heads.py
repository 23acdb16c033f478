"""Heads against plain torch: where they look, what they compute, and who owns which weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from metro_megatron import mcore
from metro_megatron.config.schema import Config, ParallelConfig
from metro_megatron.model.heads import DenseTokenHead, MLMHead, TiedDecoder, TokenHead
from metro_megatron.parallel.layout import Layout
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, small_corpus

PADDED = 384
State = dict[str, Tensor]


def said(config: Config) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, State]]]:
    """Hidden states, the token table, the masked index, and what each head says with its weights."""
    layout = Layout.create(ParallelConfig(), torch.device("cpu"))
    micro_batch = small_corpus(config).training_data(layout).step_batch(0, 0).micro_batches[0]
    transformer = mcore.auxiliary_config(config, layout.device)
    generator = torch.Generator().manual_seed(1)
    rows, length = micro_batch.tokens.shape
    hidden = torch.randn(length, rows, config.model.hidden_size, generator=generator)
    word = torch.randn(PADDED, config.model.hidden_size, generator=generator)
    heads = [
        torch.nn.utils.skip_init(TokenHead, config.model.hidden_size, device=torch.device("cpu")),
        TiedDecoder(transformer, config.model),
        MLMHead(transformer, config.model),
    ]
    results = []
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            output = head(hidden, micro_batch, word)
            state = {name: p.detach() for name, p in head.named_parameters()}
            results.append((output if isinstance(output, Tensor) else output.logits(), state))
    layout.destroy()
    return hidden, word, micro_batch.masked_index, results


def test_heads_equal_plain_torch() -> None:
    ((hidden, word, masked, results),) = run_ranks(said, 1, small_config(data={"row_format": "padded"}))
    rows = hidden.flatten(0, 1)[masked]
    (token, own), (decoded, decoder), (filled, mlm) = results
    assert set(own) == {"weight", "bias"} and token.shape == hidden.shape[:2]
    torch.testing.assert_close(token, functional.linear(hidden, own["weight"], own["bias"]).squeeze(-1))

    assert set(decoder) == {"decoder.bias"}, "the token table is borrowed"
    assert decoded.shape == (len(masked), PADDED)
    torch.testing.assert_close(decoded, rows @ word.t() + decoder["decoder.bias"])

    transformed = functional.gelu(functional.linear(rows, mlm["dense.weight"], mlm["dense.bias"]))
    size = (hidden.size(-1),)
    normed = functional.layer_norm(transformed, size, mlm["norm.weight"], mlm["norm.bias"], eps=1e-5)
    torch.testing.assert_close(filled, normed @ word.t() + mlm["decoder.bias"], rtol=1e-5, atol=1e-4)


def test_detection_logits_of_16_bits_are_those_of_exact_arithmetic() -> None:
    """bf16 would round those of 4 to 8 to steps of 0.03; gradients have the parameters' format."""
    generator = torch.Generator().manual_seed(2)
    for kind in (TokenHead, DenseTokenHead):
        head = kind(64).bfloat16()
        hidden = (4 * torch.randn(5, 3, 64, generator=generator)).bfloat16().requires_grad_()
        logits = head(hidden, None, None)  # type: ignore[arg-type] # it looks at neither
        rows = hidden if kind is TokenHead else functional.gelu(head.dense(hidden))
        exact = functional.linear(rows.double(), head.weight.double(), head.bias.double()).squeeze(-1)
        torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-6)
        assert logits.dtype == torch.float32 and not logits.equal(logits.bfloat16().float())
        logits.sum().backward()
        assert hidden.grad is not None and hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
