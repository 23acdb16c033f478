"""What runs on ranks that have Transformer Engine loaded (conftest.py)."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from transformer_engine.pytorch.optimizers import FusedAdam

from metro_megatron.checkpoint.sharded_state import of_model, sharded_state
from metro_megatron.config.schema import Config
from metro_megatron.model.init import split_dimension
from metro_megatron.parallel.adam import adam_step
from metro_megatron.parallel.layout import Layout
from metro_megatron.train.build import Parts
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.trainer import Trainer
from tests.checkpoint.test_save import equal_tensors, resumed_run, straight_run
from tests.parity.small_run import Record, run_steps, start, train_in_layouts
from tests.transformer_engine.standin import multi_tensor_adam_capturable, plain, quantize

__all__ = ["equal_tensors", "train_in_layouts"]

SLOTS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def described(configs: list[Config]) -> list[dict[str, Any]]:
    """On every rank, of each configuration: classes of the linear layers, parameters with their marks, and shards."""
    found = []
    for config in configs:
        layout = Layout.create(config.parallel, torch.device("cpu"))
        pair = Parts.build(config, layout).pair
        (main,) = pair.main
        linears = [layer.get_submodule(slot) for layer in main.block.layers for slot in SLOTS]
        marks = {
            name: (tuple(one.shape), one.dtype, split_dimension(one), getattr(one, "sequence_parallel", False))
            for name, one in main.named_parameters()
        }
        shards = {
            shard.key: [getattr(shard, name, None) for name in ("global_shape", "global_offset", "replica_id")]
            for shard in of_model(pair, layout)
            if shard.key.startswith("main.")
        }
        kinds = {type(one).__name__ for one in linears}
        found.append({"kinds": kinds, "marks": marks, "keys": list(main.state_dict()), "shards": shards})
        layout.destroy()
    return found


def fp8_layers(module: MegatronModule) -> dict[int, list[tuple[str, torch.nn.Module]]]:
    """By number of the layer, counted from 1, those of its linear layers that keep an FP8 copy of their weight."""
    return {
        layer.layer_number: [(slot, linear) for slot in SLOTS if (linear := layer.get_submodule(slot))._fp8_workspaces]
        for layer in module.modules()
        if isinstance(layer, TransformerLayer)
    }


def stale_copies(trainer: Trainer) -> tuple[dict[str, dict[int, int]], list[str]]:
    """After an evaluation: how many FP8 copies each layer has, and names of those that are not of today's weights."""
    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    trainer.homes.fetch_parameters()
    trainer.step.evaluate(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
    counts, stale = {}, []
    for name, module in (("auxiliary", trainer.pair.shared["aux"]), ("main", trainer.pair.main[0])):
        layers = fp8_layers(module)
        counts[name] = {number: len(linears) for number, linears in layers.items()}
        for number, linears in layers.items():
            for slot, linear in linears:
                kept = linear._fp8_workspaces["weight"]
                if not torch.equal(plain(kept), plain(quantize(linear.weight, kept._quantizer))):
                    stale.append(f"{name} {number} {slot}")
    return counts, stale


def fp8_runs(configs: list[Config], steps: int = 6) -> list[tuple[Record, dict[str, dict[int, int]], list[str]]]:
    """On every rank, of each configuration, with the self-check: what it showed, and `stale_copies` after it."""
    found = []
    for config in configs:
        trainer = start(config)
        trainer._check(None, trainer.corpus.training_data(trainer.layout))  # the self-check of a start
        figures, norms = run_steps(trainer, 0, steps)
        counts, stale = stale_copies(trainer)
        found.append((Record(figures, norms, {}), counts, stale))
        trainer.close()
    return found


def extra_states(config: Config) -> tuple[int, int, int]:
    """Of a model whose layers have computed in FP8: bytes that Transformer Engine keeps beside parameters, how many
    names of such are saved, which stand for nothing, and how many tensors."""
    trainer = start(config)
    run_steps(trainer, 0, 1)
    (main,) = trainer.pair.main
    kept = sum(
        len(state) for key, state in main.state_dict().items() if key.endswith("_extra_state") and state is not None
    )
    state = sharded_state(trainer.pair, trainer.optimizer, trainer.layout)
    trainer.close()
    return kept, len(state.empty), sum("_extra_state" in piece.name for piece in state.pieces)


def with_apex() -> None:
    """Apex's kernel is the same as Transformer Engine's, in a module of its own."""
    module: Any = types.ModuleType("amp_C")
    module.multi_tensor_adam_capturable = multi_tensor_adam_capturable
    sys.modules["amp_C"] = module


def relay(configs: list[Config], folders: list[Path]) -> list[tuple[Record, list[str], list[str]]]:
    """The first configuration's run with a checkpoint, which each further one resumes and saves again to its folder.

    Of those: what they showed, names of the checkpoint's tensors, and of those that differ between the two.
    """
    with_apex()
    first, *others = configs
    found = [(straight_run(first), [], [])]
    before = Path(first.train.output)
    for config, folder in zip(others, folders, strict=True):
        record = resumed_run(config, folder)
        found.append((record, *equal_tensors(before / "iter_0000003", folder / "iter_0000003")))
        before = folder
    return found


class _Scaler:
    """Of torch's GradScaler what FusedAdam asks."""

    def __init__(self, scale: torch.Tensor, found_inf: torch.Tensor):
        self.scale, self.found_inf = scale, found_inf

    def _check_inf_per_device(self, optimizer: object) -> dict[torch.device, torch.Tensor]:
        return {torch.device("cpu"): self.found_inf}

    def _get_scale_async(self) -> torch.Tensor:
        return self.scale


def fused_adams(steps: int) -> list[list[torch.Tensor]]:
    """Parameters after updates by our step and by Transformer Engine's own optimizer; the third is skipped."""
    Layout.create(Config().parallel, torch.device("cpu")).destroy()  # answers CUDA's calls
    generator = torch.Generator().manual_seed(1)
    start_values = [torch.randn(size, generator=generator) for size in (300, 7)]
    gradients = [[torch.randn(len(one), generator=generator) for one in start_values] for _ in range(steps)]
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    found = []
    for is_ours in (True, False):
        parameters = [torch.nn.Parameter(one.clone()) for one in start_values]
        adam: Any = (
            torch.optim.AdamW(parameters, fused=True, **options)
            if is_ours
            else FusedAdam(parameters, capturable=True, **options)
        )
        for step, drawn in enumerate(gradients):
            scale, skips = torch.tensor(4.0), torch.tensor(float(step == 2))
            for parameter, gradient in zip(parameters, drawn, strict=True):
                parameter.grad = gradient * 4
            if is_ours:
                adam.grad_scale, adam.found_inf = scale, skips
                adam_step("transformer_engine")(adam)
            else:
                # It counts by the flag that the step before left.
                adam._dummy_overflow_buf.copy_(skips)
                adam.step(grad_scaler=_Scaler(scale, skips))
        found.append([parameter.detach() for parameter in parameters])
    return found
