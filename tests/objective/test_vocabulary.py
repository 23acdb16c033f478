"""Losses and their gradients against torch's own, with the vocabulary padded and split."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from fused.linear_cross_entropy import Sampling, gumbel_noise
from metro_megatron.config.schema import ModelConfig, ParallelConfig
from metro_megatron.model.heads import Decoding
from metro_megatron.objective.vocabulary import vocabulary_statistics, wrong_samples
from metro_megatron.parallel.layout import Layout
from tests.distributed import run_ranks

VOCAB_SIZE, PADDED, ROWS, HIDDEN = 200, 256, 17, 8
OURS = ModelConfig(vocab_size=VOCAB_SIZE)
BERTS = replace(
    OURS, bos_token_id=101, pad_token_id=0, eos_token_id=102, mask_token_id=103, other_special_ids=[100, 199]
)
"""Special ids among the others, on three of four ranks."""


def whole_head() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(*shape, generator=generator) for shape in ((ROWS, HIDDEN), (PADDED, HIDDEN), (PADDED,))]
    keys = torch.randint(2**31, (ROWS, 2), generator=generator).int()
    return parts, torch.randint(VOCAB_SIZE, (ROWS,), generator=generator), keys


def head_on_rank(model_config: ModelConfig) -> list[torch.Tensor]:
    """Loss, predicted, sampled and two wrong ids, and the gradients of rows, weight and bias over all ranks."""
    layout = Layout.create(ParallelConfig(tensor_model_parallel_size=dist.get_world_size()), torch.device("cpu"))
    group = layout.tensor
    (rows, weight, bias), targets, keys = whole_head()
    own = [rows, weight.chunk(group.size())[group.rank()], bias.chunk(group.size())[group.rank()]]
    own = [part.clone().requires_grad_() for part in own]
    found = vocabulary_statistics(Decoding(*own), targets, model_config, group, Sampling(keys))
    gradients = list(torch.autograd.grad(found.loss.sum(), own))
    dist.all_reduce(gradients[0], group=group)  # the head's copy_to_tensor_model_parallel_region does it
    whole = [[torch.empty_like(one) for _ in range(group.size())] for one in gradients[1:]]
    for pieces, one in zip(whole, gradients[1:], strict=True):
        dist.all_gather(pieces, one, group=group)
    assert found.sampled is not None
    wrong = wrong_samples(Decoding(*own), targets, model_config, group, Sampling(keys), 2)
    ids = [found.predicted, found.sampled, wrong]
    return [found.loss.detach(), *ids, gradients[0], *(torch.cat(one) for one in whole)]


@pytest.mark.parametrize(("world_size", "model_config"), [(1, OURS), (4, OURS), (4, BERTS)])
def test_split_head_equals_torch_and_ignores_padded_ids(world_size: int, model_config: ModelConfig) -> None:
    """With four ranks the last one holds 8 real ids and 56 padded ones."""
    parts, targets, keys = whole_head()
    leaves = [part.double().requires_grad_() for part in parts]
    logits = functional.linear(*leaves)[:, :VOCAB_SIZE]
    losses = functional.cross_entropy(logits, targets, reduction="none")
    exact = torch.autograd.grad(losses.sum(), leaves)
    scores = logits + gumbel_noise(keys, torch.arange(VOCAB_SIZE, dtype=torch.int32))
    scores[:, list(model_config.special_ids.all)] = -torch.inf
    first = scores.argmax(1)
    scores[torch.arange(ROWS), targets] = -torch.inf
    for loss, predicted, sampled, wrong, *gradients in run_ranks(head_on_rank, world_size, model_config):
        torch.testing.assert_close(loss.double(), losses.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(predicted, logits.argmax(1))
        assert torch.equal(sampled, first)
        assert torch.equal(wrong, scores.argsort(1, descending=True)[:, :2])
        assert torch.equal(wrong[first != targets, 0], first[first != targets])
        for gradient, wanted in zip(gradients, exact, strict=True):
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5)


def no_rows_on_rank() -> tuple[float, float]:
    layout = Layout.create(ParallelConfig(), torch.device("cpu"))
    (rows, weight, bias), targets, keys = whole_head()
    weight.requires_grad_()
    nothing = Decoding(rows[:0], weight, bias), targets[:0], OURS, layout.tensor
    assert wrong_samples(*nothing, Sampling(keys[:0]), 2).shape == (0, 2)
    found = vocabulary_statistics(*nothing)
    found.loss.sum().backward()
    assert weight.grad is not None
    return found.loss.sum().item(), weight.grad.abs().max().item()


def test_no_rows_give_zero_with_a_gradient() -> None:
    assert run_ranks(no_rows_on_rank, 1) == [(0.0, 0.0)]
