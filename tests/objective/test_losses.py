"""Losses and their gradients against torch's own, with the vocabulary padded and split."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from metro_megatron.config import ParallelConfig
from metro_megatron.objective.losses import cross_entropy_sum, real_logits, replaced_token_detection_sum
from metro_megatron.parallel.layout import Layout
from tests.distributed import run_ranks

VOCAB_SIZE, PADDED, ROWS = 200, 256, 17


def whole_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(ROWS, PADDED, generator=generator, dtype=torch.float32) * 3
    return logits, torch.randint(VOCAB_SIZE, (ROWS,), generator=generator)


def loss_on_rank() -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss, gradient of all logits, and the logits after the loss."""
    layout = Layout.create(ParallelConfig(tensor_model_parallel_size=dist.get_world_size()), torch.device("cpu"))
    logits, targets = whole_logits()
    own = logits.chunk(layout.tensor.size(), dim=1)[layout.tensor.rank()].clone().requires_grad_()
    real = real_logits(own, VOCAB_SIZE, layout.tensor)
    before = real.detach().clone()
    loss = cross_entropy_sum(real, targets)
    assert torch.equal(real, before), "the loss changed its input"
    loss.backward()
    gradient = [torch.empty_like(own) for _ in range(layout.tensor.size())]
    dist.all_gather(gradient, own.grad)
    return loss.item(), torch.cat(gradient, 1), before


@pytest.mark.parametrize("world_size", [1, 4])
def test_cross_entropy_ignores_padded_ids(world_size: int) -> None:
    """With four ranks the last one holds 8 real ids and 56 padded ones."""
    logits, targets = whole_logits()
    logits = logits[:, :VOCAB_SIZE].double().requires_grad_()
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    for loss, gradient, _ in run_ranks(loss_on_rank, world_size):
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(gradient[:, :VOCAB_SIZE], logits.grad.float(), rtol=1e-5, atol=1e-6)
        assert gradient[:, VOCAB_SIZE:].abs().max() == 0


def test_empty_rows_give_zero_with_a_gradient() -> None:
    logits = torch.empty(0, 8, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None


def test_replaced_token_detection_is_over_real_tokens_with_original_as_label_one() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 9.0]], requires_grad=True)
    is_original = torch.tensor([[True, False], [True, True]])
    is_real = torch.tensor([[True, True], [True, False]])
    loss = replaced_token_detection_sum(logits, is_original, is_real)
    expected = torch.log1p(torch.exp(torch.tensor([-2.0, -1.0, -0.5]))).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    probability = torch.sigmoid(torch.tensor([[2.0, -1.0], [0.5, 9.0]]))
    torch.testing.assert_close(logits.grad, (probability - is_original.float()) * is_real)
