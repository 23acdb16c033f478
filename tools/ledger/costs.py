"""What the plan says of the paper's runs: parameters, memory, FLOPs and GPU hours (METRO Tables 3 to 5, Figure 5)."""

from typing import Any

from metro_megatron.config.schema import Config
from metro_megatron.plan.flops import Amount, model_flops, narayanan_flops
from metro_megatron.plan.gpus import GPUS
from metro_megatron.plan.memory import zero_memory
from metro_megatron.plan.parameters import auxiliary, main_encoder, trained
from tools.ledger.paper import is_equal, number
from tools.ledger.rows import DIFFERS, EQUAL, NOT_RUN, SIZES, Row, Section, load

GPU, EFFICIENCY = "a100-80g", 0.4
"""On what GPU hours are reckoned, and which share of its peak: assumed, not measured."""
FIGURE_5_TERAFLOPS = 1.2e11
"""Where the axes of Figures 5c and 5d end; 0.8e11 is the last mark before."""

AUXILIARY = "stated depth, width, positions, table and head make this many; the paper does not say what it counts"
COLUMNS = ("weights", "gradients", "optimizer", "total")


def run_flops(config: Config, steps: int | None = None) -> float:
    """Model FLOPs of a run in which every sample is as long as can be, as the paper counts samples."""
    samples = (steps or config.train.train_steps) * config.train.global_batch_size
    return model_flops(config, Amount.of_samples(samples, config.data.seq_length))


def gpu_hours(*configs: Config, steps: int | None = None) -> str:
    """Of one run each, or of their first steps."""
    hours = sum(run_flops(config, steps) for config in configs) / (EFFICIENCY * GPUS[GPU].tflops * 1e12) / 3600
    return f"{float(f'{hours:.2g}'):,.0f} GPU hours"


def parameters(paper: dict[str, Any]) -> Section:
    rows = []
    for preset, said in paper["table_3"].items():
        config, size = load(preset), SIZES[preset]
        sizes = {name: value for name, value in said.items() if name not in ("main", "auxiliary")}
        ours = {name: getattr(config.model, name) for name in sizes}
        said_sizes, our_sizes = ("/".join(map(str, one.values())) for one in (sizes, ours))
        rows += [
            _counted(f"{size}: main", said["main"], main_encoder(config)),
            _counted(f"{size}: auxiliary", said["auxiliary"], auxiliary(config), AUXILIARY),
            Row(f"{size}: H/FFN/layers/layers/heads", said_sizes, our_sizes, EQUAL if sizes == ours else DIFFERS),
        ]
    note = "Main: what fine-tuning takes along, token embedding included. Auxiliary: what it does not share with main."
    return Section("Table 3: sizes", rows, "python tools/plan.py --config SIZE", note)


def _counted(what: str, printed: str, ours: int, reason: str = "") -> Row:
    change = ours / number(printed) - 1
    verdict = EQUAL if is_equal(ours, printed) else f"{DIFFERS} by {change:+.1%}: {reason}"
    return Row(what, printed, f"{ours:,}", verdict)


def memory(paper: dict[str, Any]) -> Section:
    config, rows = load("xxl"), []
    for stage, said in paper["table_4"].items():
        found = zero_memory(trained(config), stage, gpus=256)
        for column, printed in zip(COLUMNS, said, strict=True):
            ours = getattr(found, column)
            change = ours / number(printed) - 1
            verdict = EQUAL if is_equal(ours, printed) else f"{DIFFERS} by {change:+.1%}: the paper adds rounded parts"
            rows.append(Row(f"ZeRO {stage}: {column}", printed, f"{ours / 1e9:.3f}G", verdict))
    note = (
        f"{trained(config):,} parameters, each once, of 2 + 2 + 16 bytes; G is 1e9. The paper's text names 12 bytes "
        "for Adam, which would be 72G; 96G are 16, with an FP32 copy of the gradient. 50M to 500M have one digit."
    )
    return Section(
        "Table 4: memory of XXL on each of 256 GPUs", rows, "python tools/plan.py --config xxl --gpus 256", note
    )


def kernels(paper: dict[str, Any]) -> Section:
    needs = f"{NOT_RUN}: an A100 for 3 minutes; the paper does not say at which size"
    rows = [Row(name, said, "-", needs) for name, said in paper["table_5"].items()]
    command = "python -m benchmarks.bench_train --config base --table5"
    return Section("Table 5: fused operations, speed up and memory saved", rows, command)


def scaling(paper: dict[str, Any]) -> Section:
    rows = []
    for preset in ("xl", "xxl"):
        config = load(preset)
        tokens = config.train.train_steps * config.train.global_batch_size * config.data.seq_length
        teraflops = narayanan_flops(config, tokens) / 1e12
        rows.append(
            Row(
                f"{SIZES[preset]}: total teraFLOPs (c, d)",
                f"at most {FIGURE_5_TERAFLOPS:.1e}",
                f"{teraflops:.2e}; {run_flops(config) / 1e12:.2e} exact",
                EQUAL if teraflops <= FIGURE_5_TERAFLOPS else f"{DIFFERS}: beyond the axis",
            )
        )
    ends = f"{NOT_RUN}: {gpu_hours(*map(load, ('base_pp', 'large_pp', 'xl', 'xxl')))} and the corpora of Table 12"
    rows.append(Row("MNLI and SQuAD by size (a, b)", "METRO-LM above the others", "-", ends))
    rows.append(Row("MNLI and SQuAD by teraFLOPs (c, d)", "XXL above most at 40% of its steps", "-", ends))
    note = "The paper prints no number; its formula is Megatron's, 96 B s l h^2 (1 + s/6h + V/16lh), of both encoders."
    return Section("Figure 5: scaling", rows, "python tools/plan.py --config SIZE", note)
