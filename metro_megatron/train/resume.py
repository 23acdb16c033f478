"""What must be equal for a run to be the continuation of another."""

from dataclasses import asdict

from metro_megatron.config import Config

FREE = {
    "parallel": None,
    "checkpoint": None,
    "data": {"micro_batch_tokens", "micro_batch_size", "prefetch_steps", "row_format", "train", "validation"},
    "train": {"output", "log_interval", "eval_interval", "eval_samples", "device"},
}
"""What may differ: layout, rows and reporting. None stands for a whole concern. Shards may have moved: their
contents are compared by the manifests' hashes instead."""


def config_differences(saved: Config, given: Config) -> list[str]:
    """One line per field whose change would make another run of it."""
    there, here = asdict(saved), asdict(given)
    lines = []
    for concern, fields in there.items():
        free = FREE.get(concern, set())
        if free is None:
            continue
        for name, value in fields.items():
            if name not in free and here[concern][name] != value:
                lines.append(f"{concern}.{name} is {here[concern][name]!r}, but the checkpoint was made with {value!r}")
    return lines
