"""How many operations a layer is to a GPU: what a micro batch takes at two depths, and their difference."""

from collections import Counter
from dataclasses import replace

import torch

from tests.device_operations import device_operations
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start

Operations = tuple[Counter[str], Counter[str]]


def of_main(num_layers: int) -> Operations:
    """Forward, and backward with the sums of gradients, over one packed micro batch in bfloat16, with dropout."""
    config = small_config(
        model={"num_attention_heads": 2, "num_layers": num_layers, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        train={"precision": "bf16"},
    )
    trainer = start(config)
    (micro_batch, *_) = trainer.corpus.training_data(trainer.layout).step_batch(0, 0).micro_batches
    micro_batch, main = replace(micro_batch, dropout_seed=torch.tensor([3])), trainer.pair.main[0]
    with device_operations() as forward:
        hidden = main.encode(micro_batch.tokens, micro_batch)
    with device_operations() as backward:
        hidden.backward(torch.ones_like(hidden))
    trainer.close()
    return forward, backward


def of_layer() -> Operations:
    """Post-LN with the relative bias and reset [CLS]."""
    (forward, backward), (more_forward, more_backward) = (of_main(depth) for depth in (2, 3))
    return more_forward - forward, more_backward - backward


def test_a_layer_is_few_operations() -> None:
    """45 are what it may take. 12 add a gradient to the buffer, one for each parameter: 8 are megatron-core's, 4 are of
    products in FP32, which take two conversions each here and none on a GPU."""
    ((forward, backward),) = run_ranks(of_layer, 1)
    assert forward == {
        "addmm": 2,  # products with their bias: q, k and v, and the MLP's first
        "mm": 2,  # those whose bias layer_norm adds
        "new_zeros": 1,  # attention's output, for tokens of no sample
        "fused.attention.kernels.forward_kernel": 1,
        "gelu": 1,
        "fused.layer_norm.kernels.forward_kernel": 2,
    }
    assert backward == {
        "mm": 8,
        "_to_copy": 8,
        "sum": 2,  # gradients of the biases in products
        "gelu_backward": 1,
        "fused.layer_norm.kernels.backward_kernel": 2,
        "fused.layer_norm.kernels.column_kernel": 2,
        "zero_": 1,  # the gradient of q, k and v, for tokens of no sample
        "fused.attention.kernels.query_kernel": 1,
        "fused.attention.kernels.bias_kernel": 1,
        "fused.attention.kernels.key_kernel": 1,
        "add": 4,  # at both residuals, and to what the layers above found for both parts of the bias
        "add_": 12,
    }
    assert forward.total() + backward.total() - backward["_to_copy"] <= 45
