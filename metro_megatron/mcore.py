"""What fills megatron-core's configuration classes (0.16), and its calls that need more than their arguments."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import distrib_optimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from fused.weight_gradient import add_weight_gradient
from metro_megatron.config.schema import Config, EncoderSizes, OptimizerConfig, ParallelConfig
from metro_megatron.nvidia import Implementation, describe, linear_layers, transformer_impl

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def auxiliary_config(config: Config, device: torch.device) -> TransformerConfig:
    """The auxiliary encoder: never in the pipeline, with main's dropout or none."""
    model = config.model
    dropout = (0.0, 0.0) if model.auxiliary_dropout == "zero" else (model.hidden_dropout, model.attention_dropout)
    return _transformer_config(config, _unstaged(config), model.auxiliary, device, dropout)


def tied_config(config: Config, device: torch.device) -> TransformerConfig:
    """What both phases use, of the main encoder's sizes: never in the pipeline."""
    return _transformer_config(config, _unstaged(config), config.model.main, device, dropout=(0.0, 0.0))


def main_config(config: Config, device: torch.device, chunk_layers: Sequence[int] = ()) -> TransformerConfig:
    """This rank's part of the main encoder.

    chunk_layers: of every chunk of the pipeline, from the bottom up; none given: all are equal.
    """
    dropout = (config.model.hidden_dropout, config.model.attention_dropout)
    chunks = [["decoder"] * layers for layers in chunk_layers]
    if chunks:
        chunks = [["embedding", *chunks[0]], *chunks[1:]]
        chunks[-1].append("loss")
    return _transformer_config(config, config.parallel, config.model.main, device, dropout, chunks)


def whose_layers(config: Config, device: torch.device) -> str:
    """Whose linear layers a run has on this machine."""
    return linear_layers(config.parallel.transformer_impl, device.type, config.train.precision)


def implementations(config: Config, device: torch.device) -> str:
    """One sentence for the start of a run: whose linear layers and whose Adam it has, and why."""
    optimizer, parallel, train = config.optimizer, config.parallel, config.train
    return describe(parallel.transformer_impl, device.type, train.precision, train.fp8_recipe, optimizer.adam_impl)


def _unstaged(config: Config) -> ParallelConfig:
    """The run's parallelism without the pipeline, which phase 1 does not have."""
    return ParallelConfig(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.parallel.recompute,
        transformer_impl=config.parallel.transformer_impl,
        recompute_modules=config.parallel.recompute_modules,
    )


def _transformer_config(
    config: Config,
    parallel: ParallelConfig,
    sizes: EncoderSizes,
    device: torch.device,
    dropout: tuple[float, float],
    chunks: Sequence[list[str]] = (),
) -> TransformerConfig:
    model, dtype = config.model, DTYPES[config.train.precision]
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    # The interleaved schedule's exchanges run beside its computation, one by one. Batched ones could not, and with two
    # stages, where "previous" and "next" are one peer, would pair up crosswise: wrong gradients without an error.
    unbatched = parallel.is_interleaved
    implementation = transformer_impl(parallel.transformer_impl, device.type, config.train.precision)
    fp8 = {"fp8": "hybrid", "fp8_recipe": config.train.fp8_recipe, "first_last_layers_bf16": True}
    made = TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.ffn_hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        layernorm_epsilon=model.layer_norm_eps,
        hidden_dropout=dropout[0],
        attention_dropout=dropout[1],
        activation_func=torch.nn.functional.gelu,  # exact erf; megatron-core's fused GELU is the tanh one
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        attention_softmax_in_fp32=True,
        # model/init.py fills the weights, by global names. megatron-core's initialization cannot be switched
        # off: it is where weights get the marks that say how they are split.
        init_method=_leave,
        output_layer_init_method=_leave,
        use_cpu_initialization=device.type == "cpu",
        params_dtype=dtype,
        bf16=config.train.precision == "bf16",
        fp16=config.train.precision == "fp16",
        pipeline_dtype=dtype if pp > 1 else None,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if parallel.is_interleaved else None,
        pipeline_model_parallel_layout=list(chunks) if pp > 1 and chunks else None,
        sequence_parallel=parallel.sequence_parallel,
        overlap_p2p_comm=unbatched,
        batch_p2p_comm=not unbatched,
        transformer_impl=implementation,
        gradient_accumulation_fusion=_accumulates(config, implementation),
        batch_p2p_sync=False,  # would wait for the whole device after every exchange, for torch before 2.0
        **(recompute if parallel.recompute == "full" else {}),  # type: ignore[arg-type]
        **(fp8 if config.train.fp8_recipe != "none" else {}),  # type: ignore[arg-type]
    )
    _use_torch_products()
    # Read by our layers. megatron-core's checks, which are done, know no GELU outside of its mixtures of experts.
    made.recompute_modules = list(parallel.recompute_modules) if parallel.recompute == "selective" else []
    return made


def _accumulates(config: Config, implementation: Implementation) -> bool:
    """Whether products add weight gradients to DDP's sums themselves: where 16 bits would round each before.

    A weight that another product reads, too, as those behind early exits do, would lose that one's.
    """
    rounds = config.train.precision != "fp32" and config.parallel.grad_reduce_in_fp32
    return not config.early_exit.layers and (rounds or implementation == "transformer_engine")


def _use_torch_products() -> None:
    """Have megatron-core's layers add weight gradients up by torch's product, where they would ask for Apex's."""
    parallel_layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
    parallel_layers._grad_accum_fusion_available = True


def group_micro_batches(config: TransformerConfig, count: int) -> None:
    """Have the interleaved schedule take `count` micro batches, at least one for each stage.

    It works on a group of them at a time, and no group, nor what remains, may be smaller than the pipeline.
    """
    stages = config.pipeline_model_parallel_size
    sizes = range(stages, count + 1)
    config.microbatch_group_size_per_vp_stage = next(
        size for size in sizes if count % size == 0 or count % size >= stages
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def wrap(
    module: MegatronModule, config: TransformerConfig, run: Config, groups: ProcessGroupCollection
) -> DistributedDataParallel:
    """DDP with sharded optimizer state whose gradients are plain sums."""
    overlap = run.parallel.overlap
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=run.parallel.grad_reduce_in_fp32 and run.train.precision != "fp32",
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        align_param_gather=overlap,
    )
    config.calculate_per_token_loss = True  # read while DDP is built: gradients are not averaged
    try:
        return DistributedDataParallel(config, ddp_config, module, pg_collection=groups)
    finally:
        config.calculate_per_token_loss = False


@dataclass(frozen=True)
class OwnGroup:
    """Parameters that are updated by options of their own."""

    name: str
    parameters: Set[torch.nn.Parameter]
    settings: dict[str, Any]
    """Over those of all others, in torch's parameter groups."""


def distributed_optimizer(
    ddps: list[DistributedDataParallel],
    options: OptimizerConfig,
    precision: str,
    groups: ProcessGroupCollection,
    own_groups: list[OwnGroup],
) -> DistributedOptimizer:
    """Adam of one home with its state sharded over the home's replicas (ZeRO-1).

    It is torch's, whatever is installed, in its fused form: one pass that also divides gradients and skips an update
    (parallel/optim.py), so that results do not depend on the machine's libraries. Another library's kernel computes the
    same update on the same state (parallel/adam.py), so that checkpoints do not depend on the kernel.
    """
    # megatron-core prefers Transformer Engine's or Apex's, and asks these where it builds and where it saves.
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    config = McoreOptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=DTYPES[precision],
        initial_loss_scale=options.initial_loss_scale,
        min_loss_scale=options.min_loss_scale,
        loss_scale_window=options.loss_scale_window,
        hysteresis=options.hysteresis,
        use_distributed_optimizer=True,
    )
    # The standard ones: biases and norms are not decayed.
    overrides: dict[ParamKey, Any] = {} if options.decay_all else get_standard_config_overrides(config)
    for own in own_groups:
        # One of four entries by which megatron-core tells the groups of a checkpoint apart, and the one without a use.
        settings = {"is_decoupled_lr": own.name, **own.settings}
        overrides[ParamKey(predicate=ParamPredicate(own.name, own.parameters.__contains__))] = settings
    chained = get_megatron_optimizer(
        config,
        ddps,
        config_overrides=overrides,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    (optimizer,) = chained.chained_optimizers
    # megatron-core counts a group's parameters in the order of the model, and hands torch those in FP32 before others.
    for group, both in enumerate(zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)):
        for index, parameter in enumerate(chain(*both)):
            optimizer.model_param_group_index_map[parameter] = (group, index)
    fuse(optimizer.optimizer)
    return optimizer


def fuse(adam: torch.optim.AdamW) -> None:
    """Have torch's Adam use its fused kernel, which counts steps beside the parameters."""
    for group in adam.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            if parameter in adam.state:
                state = adam.state[parameter]
                state["step"] = state["step"].to(parameter.device, torch.float32, copy=True)
