"""A plan as numbers, which tools/plan.py writes as JSON, and as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from metro_megatron.config.schema import Config
from metro_megatron.plan.flops import done_flops, model_flops, narayanan_flops, works
from metro_megatron.plan.layouts import Cluster, Estimate, reason, step_amount
from metro_megatron.plan.memory import Memory, alone, run_memory, zero_memory
from metro_megatron.plan.parameters import Home, auxiliary, main_encoder, parts, trained
from metro_megatron.plan.stages import stage_layers

Plan = dict[str, Any]
PAPER = {
    "frozen": {"flops": "20 to 30%", "memory": "20 to 25%"},
    "cached": {"flops": "30 to 40%", "memory": "20 to 25%"},
}
"""What Fast-ELECTRA (arXiv 2310.07347) is said to save at base size, by its public reviews."""

_HOMES: dict[Home, str] = {
    "tied": "shared",
    "auxiliary": "shared",
    "first": "first stage",
    "layers": "every stage",
    "last": "last stage",
    "frozen": "none",
}
_SIZES = ("tensor_model", "pipeline_model", "virtual_pipeline_model")


def plan(config: Config, cluster: Cluster, own: Estimate | None, found: Sequence[Estimate]) -> Plan:
    """Everything that is known before a model is built. own: as configured; found: layouts, the best one first."""
    made = {
        "parameters": {
            "components": [{"name": one.name, "home": one.home, "parameters": one.total} for one in parts(config)],
            "main_encoder": main_encoder(config),
            "auxiliary": auxiliary(config),
            "trained": trained(config),
        },
        "flops": _flops(config, cluster),
        "memory": {
            "zero": [_memory(zero_memory(trained(config), stage, cluster.gpus)) for stage in range(4)],
            "configured": _configured_memory(own) if own else {},
        },
        "layouts": [_layout(one, found[0]) for one in found],
        "configured": _layout(own, found[0]) if own else None,
    }
    if config.corruption.source in PAPER:
        made["trained_auxiliary"] = _compared(config, cluster)
    return made


def _flops(config: Config, cluster: Cluster) -> Plan:
    """Of a token in GFLOP, of the run in teraFLOPs as METRO Figure 5 counts them: 10^12 operations, not a rate."""
    real, steps = step_amount(config, cluster.fill), config.train.train_steps
    one = real * (1 / real.tokens)
    return {
        "components": [
            {"name": work.name, "forward": work.forward(one), "passes": work.passes, "again": work.again}
            for work in works(config)
        ],
        "model_gflop_per_token": model_flops(config, one) / 1e9,
        "done_gflop_per_token": done_flops(config, one) / 1e9,
        "exact_teraflops": steps * model_flops(config, real) / 1e12,
        "done_teraflops": steps * done_flops(config, real) / 1e12,
        "narayanan_teraflops": steps * narayanan_flops(config, real.tokens) / 1e12,
        "real_tokens": steps * real.tokens,
    }


def _memory(memory: Memory) -> dict[str, float]:
    return {**vars(memory), "total": memory.total}


def _configured_memory(own: Estimate) -> dict[str, dict[str, float]]:
    """Without and with recomputation."""
    config, gpus = own.config, own.cluster.gpus
    return {
        f"as configured, recompute {recompute}": _memory(
            run_memory(replace(config, parallel=replace(config.parallel, recompute=recompute)), gpus)  # type: ignore[arg-type]
        )
        for recompute in ("none", "selective", "full")
    }


def _layout(one: Estimate, best: Estimate) -> Plan:
    return {
        "options": one.options,
        "stage_layers": stage_layers(one.config),
        "data_parallel_size": one.cluster.gpus // one.config.parallel.model_ranks,
        "seconds_per_step": one.seconds.total,
        "seconds": vars(one.seconds),
        "tokens_per_second": one.tokens_per_second,
        "mfu": one.mfu,
        "days": one.days,
        "memory": one.memory.total,
        "fits": one.fits,
        "loses": "" if one.options == best.options else reason(one, best),
    }


def _compared(config: Config, cluster: Cluster) -> Plan:
    """Shares of FLOPs and memory that the run saves of the same one with a trained auxiliary."""
    other = replace(config, corruption=replace(config.corruption, source="auxiliary"))
    amount = step_amount(config, cluster.fill)
    one, two = (run_memory(alone(each), 1) for each in (config, other))
    return {
        "flops_saved": 1 - model_flops(config, amount) / model_flops(other, amount),
        "states_saved": 1 - one.states / two.states,
        "memory_saved": 1 - one.total / two.total,
        "paper": PAPER[config.corruption.source],
    }


def chosen(found: Sequence[Estimate], own: Estimate | None = None, runners_up: int = 4) -> list[Estimate]:
    """The best layout that fits, then the best of other sizes, and what would be faster but for its memory.

    own, the configured one, is the best where none is faster by a thousandth. Of equal tensor and pipeline sizes, one
    stands for all. Empty where nothing fits.
    """
    best = next((one for one in found if one.fits), None)
    if best is None:
        return []
    if own is not None and own.fits and own.seconds.total <= 1.001 * best.seconds.total:
        best = own
    firsts: dict[tuple[int, int, bool], Estimate] = {}
    for one in found:
        if one.fits or one.seconds.total < 0.99 * best.seconds.total:
            firsts.setdefault(_sizes(one), one)
    same = _sizes(best)
    others = [one for sizes, one in firsts.items() if sizes != same]
    return [best, *others[:runners_up]]


def _sizes(one: Estimate) -> tuple[int, int, bool]:
    parallel = one.config.parallel
    return parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, one.fits


def text(made: Plan, config: Config, cluster: Cluster, gpu_name: str) -> str:
    """For reading."""
    return "\n\n".join("\n".join(lines) for lines in _sections(made, config, cluster, gpu_name))


def _sections(made: Plan, config: Config, cluster: Cluster, gpu_name: str) -> Iterator[list[str]]:
    counts, flops, memory = made["parameters"], made["flops"], made["memory"]
    rows = [[one["name"], _HOMES[one["home"]], f"{one['parameters']:,}"] for one in counts["components"]]
    sums = {"main encoder, for fine-tuning": "main_encoder", "auxiliary alone": "auxiliary", "all trained": "trained"}
    rows += [[label, "", f"{counts[name]:,}"] for label, name in sums.items()]
    yield table(["parameters", "home", "count"], rows)

    rows = [
        [one["name"], f"{one['forward'] / 1e6:,.2f}", str(one["passes"]), str(one["again"])]
        for one in flops["components"]
    ]
    model, done = flops["model_gflop_per_token"], flops["done_gflop_per_token"]
    yield [
        *table(["FLOPs of a real token", "forward, M", "passes", "again"], rows),
        f"a token: {model:,.3f} GFLOP, with what backward computes again {done:,.3f}",
        f"the run, {flops['real_tokens']:.3g} tokens, in teraFLOPs: {flops['exact_teraflops']:.3g} exact, "
        f"{flops['done_teraflops']:.3g} with recomputation, {flops['narayanan_teraflops']:.3g} by 96 B s l h^2 (...)",
    ]

    columns = ["weights", "gradients", "optimizer", "activations", "heads", "total"]
    states = [(f"ZeRO {stage}: 2 + 2 + 16 bytes", one) for stage, one in enumerate(memory["zero"])]
    states += [(label, one) for label, one in memory["configured"].items()]
    rows = [[label, *(f"{one[name] / 1e9:,.2f}" if one[name] else "" for name in columns)] for label, one in states]
    yield table([f"GB a GPU, of {cluster.gpus:,}", *columns], rows)

    if "trained_auxiliary" in made:
        saved = made["trained_auxiliary"]
        rows = [
            ["FLOPs", f"{saved['flops_saved']:.1%}", saved["paper"]["flops"]],
            ["memory of one GPU", f"{saved['memory_saved']:.1%}", saved["paper"]["memory"]],
            ["of it, weights, gradients, optimizer", f"{saved['states_saved']:.1%}", ""],
        ]
        yield table(["saved of a trained auxiliary's", "here", "Fast-ELECTRA"], rows)

    yield list(_layout_lines(made, config, cluster, gpu_name))


def _layout_lines(made: Plan, config: Config, cluster: Cluster, gpu_name: str) -> Iterator[str]:
    peak = cluster.gpu.peak(config.train.precision)
    yield (
        f"{cluster.gpus:,} x {gpu_name}, compute at {cluster.efficiency:.0%} of {peak:,g} TFLOP/s, "
        f"{cluster.network / 1e9:,.0f} GB/s between nodes, samples {cluster.fill:.0%} full: assumed, not measured"
    )
    best, own = made["layouts"][0], made["configured"]
    is_own = own is not None and own["options"] == best["options"]
    listed = [("best, as configured" if is_own else "best", best), *(("", one) for one in made["layouts"][1:])]
    listed += [("as configured", own)] if own and not is_own else []
    columns = ["", "tp", "pp", "vpp", "dp", "micro batch", "recompute", "step ms", "tokens/s", "MFU", "days", "GB"]
    rows = [
        [
            label,
            *(str(one["options"][f"parallel.{name}_parallel_size"]) for name in _SIZES),
            str(one["data_parallel_size"]),
            str(list(one["options"].values())[-1]),
            str(one["options"]["parallel.recompute"]),
            f"{1e3 * one['seconds_per_step']:,.1f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['mfu']:.1%}",
            f"{one['days']:,.1f}",
            f"{one['memory'] / 1e9:,.1f}",
            one["loses"],
        ]
        for label, one in listed
    ]
    yield from table([*columns, "because"], rows)
    for label, one in listed:
        if label and len(one["stage_layers"]) > 1:
            runs = [(layers, len(list(same))) for layers, same in groupby(one["stage_layers"])]
            written = ", ".join(f"{layers}" if count == 1 else f"{layers} on each of {count}" for layers, count in runs)
            yield f"layers of the stages, {label}: {written}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned lines: numbers to the right, words to the left."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    is_number = [all(row[n][:1].isdigit() for row in rows if row[n]) for n in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in [head, *rows]
    ]
