"""What a log line says of the steps since the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from metro_megatron.config.schema import Config
from metro_megatron.objective.figures import weighted
from metro_megatron.objective.term import Term
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Update
from metro_megatron.plan.flops import Amount, achieved_tflops
from metro_megatron.plan.gpus import peak_tflops
from metro_megatron.train.progress import Progress


def interval_figures(
    config: Config,
    layout: Layout,
    terms: Sequence[Term],
    progress: Progress,
    sums: Mapping[str, float],
    lap: tuple[float, float, int],
    trained: tuple[Amount, float],
    update: Update,
    skipped: int,
) -> dict[str, float]:
    """Figures by the names that they have in metrics.jsonl.

    sums are the reduced ones of the interval's steps, lap its seconds, those that it waited for data, and its steps;
    trained is what these trained on and its model FLOPs, update the last of them, skipped the updates left out so far.
    """
    seconds, waited, steps = lap
    amount, flops = trained
    figures = dict(sums)
    figures.pop("tokens")  # with those before an interruption, which these seconds do not have
    losses = {term.name: figures[f"{term.name}_loss"] for term in terms}
    return {
        "consumed_samples": progress.seen_samples,
        "consumed_tokens": progress.seen_tokens,
        **figures,
        "loss": weighted(terms, losses, progress.done - 1),
        "grad_norm": update.grad_norm,
        "shared_grad_norm": update.shared_grad_norm,
        "stage_grad_norm": update.stage_grad_norm,
        "loss_scale": update.loss_scale,
        "skipped_steps": skipped,
        "learning_rate": update.learning_rate,
        "tokens_per_second": amount.tokens / seconds,
        **_utilization(config, layout, flops, seconds),
        "seconds_per_step": seconds / steps,
        "data_share": waited / seconds,
    }


def _utilization(config: Config, layout: Layout, flops: float, seconds: float) -> dict[str, float]:
    """Model FLOPs of real tokens (plan/flops.py): in TFLOP/s a process, and as a share of its data sheet's."""
    tflops = achieved_tflops(flops, seconds, layout.world.size())
    is_cuda = layout.device.type == "cuda"
    name = torch.cuda.get_device_name(layout.device) if is_cuda else ""
    peak = peak_tflops(name, config.train.precision)
    return {"tflops_per_gpu": tflops, **({"mfu": tflops / peak} if peak else {})}
