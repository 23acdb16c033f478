"""What is made again is what was there: gradients to the bit, with dropout, in both orders of norms."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config, EarlyExitConfig
from metro_megatron.model.init import global_parameters
from metro_megatron.train.metrics import MetricSums
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start

MODULES = {
    False: [["mlp_act"], ["core_attn", "mlp"]],
    True: [["layernorm"], ["core_attn", "layernorm", "mlp_act"], ["mlp"]],
}
"""By model.norm_first."""


def dropping(norm_first: bool, modules: list[str], parallel: dict[str, Any] | None = None) -> Config:
    chosen = {"recompute": "selective", "recompute_modules": modules} if modules else {}
    model = {"norm_first": norm_first, "hidden_dropout": 0.1, "attention_dropout": 0.1, "auxiliary_dropout": "train"}
    return small_config(model=model, parallel={**chosen, **(parallel or {})}, train={"global_batch_size": 8})


def gradients_of_a_step(configs: list[Config]) -> list[dict[str, Tensor]]:
    """On every rank: those of the first step, before the update."""
    found = []
    for config in configs:
        trainer = start(config)
        batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
        trainer.optimizer.step = lambda step, *others: None  # type: ignore[method-assign,assignment]
        trainer.step.train(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
        gradients = {
            name: parameter.main_grad.clone()  # type: ignore[attr-defined]
            for prefix, module in trainer.pair.modules()
            for name, parameter in global_parameters(module, prefix)
        }
        trainer.close()
        found.append(gradients)
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, marks=pytest.mark.long),
        pytest.param(2, {"pipeline_model_parallel_size": 2}, marks=pytest.mark.long),
    ],
)
def test_gradients_are_equal_to_the_bit(world_size: int, parallel: dict[str, Any]) -> None:
    for norm_first, choices in MODULES.items():
        configs = [dropping(norm_first, modules, parallel) for modules in ([], *choices)]
        assert not [one for config in configs for one in problems(config, world_size) if "recompute" in one]
        for plain, *others in run_ranks(gradients_of_a_step, world_size, configs):
            for modules, gradients in zip(choices, others, strict=True):
                assert gradients.keys() == plain.keys()
                for name, gradient in plain.items():
                    assert torch.equal(gradients[name], gradient), (modules, name)


def flops_of_a_step(configs: list[Config]) -> list[int]:
    """On every rank: of all products."""
    found = []
    for config in configs:
        trainer = start(config)
        batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
        with FlopCounterMode(display=False) as counter:
            trainer.step.train(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
        found.append(counter.get_total_flops())
        trainer.close()
    return found


def test_norms_and_gelu_repeat_no_product() -> None:
    """Nor do products that tensor-parallel ranks divide, which save what they read behind themselves."""
    configs = [
        dropping(True, modules, {"tensor_model_parallel_size": 2}) for modules in ([], ["mlp_act"], ["layernorm"])
    ]
    for plain, *others in run_ranks(flops_of_a_step, 2, configs):
        assert others == [plain, plain]


@pytest.mark.long
def test_early_exits_attention_is_made_again() -> None:
    exits = EarlyExitConfig(layers=[1, 3], share="0.7")
    configs = [replace(dropping(False, modules), early_exit=exits) for modules in ([], ["core_attn"])]
    ((plain, again),) = run_ranks(gradients_of_a_step, 1, configs)
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name
