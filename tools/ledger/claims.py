"""What the abstracts of Fast-ELECTRA and of the early-exit paper claim; of both the abstracts are all we know."""

from dataclasses import replace
from typing import Any

from metro_megatron.config.schema import Config, CorruptionConfig, EarlyExitConfig
from metro_megatron.plan.flops import Amount, model_flops, proposer, proposer_passes
from metro_megatron.plan.gpus import GPUS
from metro_megatron.plan.layouts import Cluster
from metro_megatron.plan.parameters import parts
from metro_megatron.plan.report import plan
from tools.ledger.costs import EFFICIENCY, GPU, gpu_hours
from tools.ledger.recipe import FINETUNING
from tools.ledger.rows import DIFFERS, EQUAL, NOT_RUN, Row, Section, load

WIKIPEDIA = f"Wikipedia and BookCorpus, {FINETUNING}"
REASONS = {
    "flops": "of model FLOPs, with an auxiliary of 4 layers and heads on masked tokens only",
    "memory": "main's own states and activations are most of a GPU's memory here, and a frozen model has a token table",
}
"""Why a share may lie outside the reviews' range."""


def fast_electra(paper: dict[str, Any]) -> Section:
    said = paper["fast_electra"]
    frozen = _with_source("frozen")
    quality = f"{NOT_RUN}: {gpu_hours(load('base'), frozen)} for METRO base and a frozen auxiliary, {WIKIPEDIA}"
    sweep = f"{NOT_RUN}: {gpu_hours(*4 * [load('base')], *4 * [frozen])} for four learning rates of each, {WIKIPEDIA}"
    stable = f"{NOT_RUN}: {gpu_hours(load('xl'), steps=60000)} for 60,000 steps of each of Figure 3's arms at XL"
    rows = [
        _existing(said["existing"]),
        _temperature(said["temperature"]),
        *_costs(said["cost"]),
        Row(said["quality"], "-", "-", quality),
        Row(said["sensitivity"], "-", "-", sweep),
        Row(said["stability"], "-", "-", stable),
    ]
    return Section("Fast-ELECTRA (arXiv 2310.07347), abstract", rows, "python tools/plan.py --config base")


def _existing(claim: str) -> Row:
    """Nothing of an auxiliary model is trained, and its samples still cost a pass."""
    frozen = _with_source("frozen")
    left = sum(part.total for part in parts(frozen) if part.home == "auxiliary")
    ours = f"`corruption.source` frozen trains {left:,} parameters of it, and passes {proposer_passes(frozen)} time"
    return Row(claim, "-", ours, EQUAL if (left, proposer_passes(frozen)) == (0, 1) else DIFFERS)


def _temperature(claim: str) -> Row:
    """T(u) = 1 + (T0 - 1) exp(-u / tau), T0 2, tau 0.1: 1.368 after a tenth of the run."""
    options = CorruptionConfig(temperature_schedule="exponential", temperature=2.0, temperature_tau=0.1)
    schedule = replace(load("base"), corruption=options).schedules.get("corruption.sampling_temperature")
    values = [schedule.at(share, 100) for share in (0, 10, 30, 100)] if schedule else []
    ours = ", ".join(f"{value:.3f}" for value in values)
    falls = bool(values) and values == sorted(set(values), reverse=True)
    return Row(claim, "-", f"T at 0, 10, 30, 100% of the run: {ours or 'not read'}", EQUAL if falls else DIFFERS)


def _costs(claim: str) -> list[Row]:
    """Shares of a METRO base run. The abstract gives none; those of the paper are quoted in its public reviews."""
    cluster = Cluster(GPUS[GPU], gpus=1, efficiency=EFFICIENCY, network=0.0)
    rows = []
    for source in ("frozen", "cached"):
        saved = plan(_with_source(source), cluster, None, [])["trained_auxiliary"]
        for what in ("flops", "memory"):
            share, said = saved[f"{what}_saved"], saved["paper"][what]
            low, high = (int(word.rstrip("%")) for word in said.split(" to "))
            fits = low <= round(100 * share) <= high
            verdict = EQUAL if fits else f"{DIFFERS}: {REASONS[what]}"
            rows.append(Row(f"{claim}: {what}, {source}", f"{said} (reviews)", f"{share:.0%}", verdict))
    return rows


def early_exit(paper: dict[str, Any]) -> Section:
    said, base = paper["early_exit"], load("base")
    exits = replace(base, early_exit=EarlyExitConfig(layers=[4, 8]))
    relieved = f"our reading: exits behind layers 4 and 8 save {_saved(exits):.0%} of the run's FLOPs"
    rows = [
        Row(said["exit"], "-", relieved, EQUAL if _saved(exits) > 0 else DIFFERS),
        Row(said["quality"], "-", "-", f"{NOT_RUN}: {gpu_hours(base, base)} for base with and without, {WIKIPEDIA}"),
        *(_without_generator(said["generator"], source) for source in ("uniform", "unigram", "main")),
        Row(said["failure"], "-", "-", f"{NOT_RUN}: {gpu_hours(*map(_with_source, ('uniform', 'main')))}, {WIKIPEDIA}"),
    ]
    return Section("Early exit (arXiv 2110.06620), abstract", rows, "python tools/plan.py --config base")


def _without_generator(claim: str, source: str) -> Row:
    config = _with_source(source)
    depth, others = proposer(config).num_layers, load("base").model.auxiliary_num_layers
    verdict = EQUAL if _saved(config) > 0 else f"{DIFFERS}: {depth} of main's layers propose in place of {others}"
    return Row(f"{claim}: {source}", "-", f"{_saved(config):.0%} of FLOPs of base", verdict)


def _saved(config: Config) -> float:
    """Share of METRO-LM base's model FLOPs."""
    base = load("base")
    amount = Amount.of_samples(1, base.data.seq_length)
    return 1 - model_flops(config, amount) / model_flops(base, amount)


def _with_source(source: Any) -> Config:
    """METRO-LM base with another source of replacements."""
    base = load("base")
    return replace(base, corruption=replace(base.corruption, source=source))
