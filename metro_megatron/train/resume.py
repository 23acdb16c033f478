"""What must be equal for a run to be the continuation of another."""

from metro_megatron.config import Config
from metro_megatron.config_file import differences

FREE = (
    "parallel.",
    "checkpoint.",
    "data.micro_batch_tokens",
    "data.micro_batch_size",
    "data.prefetch_steps",
    "data.row_format",
    "data.train",
    "data.validation",
    "train.output",
    "train.log_interval",
    "train.eval_interval",
    "train.eval_samples",
    "train.device",
)
"""What may differ: layout, rows and reporting. Shards may have moved: their contents are compared instead. A name
that ends with a dot stands for its whole concern."""


def config_differences(saved: Config, given: Config) -> list[str]:
    """One line per field whose change would make another run of it."""
    return [
        f"{name} is {here!r}, but the checkpoint was made with {there!r}"
        for name, (there, here) in differences(saved, given).items()
        if not any(name == free or (free.endswith(".") and name.startswith(free)) for free in FREE)
    ]
