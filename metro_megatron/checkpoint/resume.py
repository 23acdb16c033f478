"""What must be equal for a run to be the continuation of another."""

from pathlib import Path

from metro_megatron.config.file import differences, load_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError

FREE = (
    "parallel.",
    "checkpoint.",
    "data.micro_batch_tokens",
    "data.micro_batch_size",
    "data.index_cache",
    "data.prefetch_steps",
    "data.row_format",
    "data.train",
    "data.validation",
    "train.output",
    "train.log_interval",
    "train.eval_interval",
    "train.eval_samples",
    "train.device",
    "train.fused",
)
"""What may differ: layout, rows, kernels and reporting. Shards may have moved: their contents are compared instead. A
name that ends with a dot stands for its whole concern."""


def config_differences(saved: Config, given: Config) -> list[str]:
    """One line per field whose change would make another run of it."""
    return [
        f"{name} is {here!r}, but the checkpoint was made with {there!r}"
        for name, (there, here) in differences(saved, given).items()
        if not any(name == free or (free.endswith(".") and name.startswith(free)) for free in FREE)
    ]


def refuse_other_run(iteration: Path, config: Config) -> None:
    """Raise UserError naming all differences if `config` does not continue the run of a checkpoint folder."""
    found = config_differences(load_config(iteration / "run_config.yaml"), config)
    if found:
        raise UserError([*found, f"{iteration}: give the values of this checkpoint, or choose another train.output"])
