"""What must be equal for a run to be the continuation of another."""

from pathlib import Path

from metro_megatron.checkpoint.files import AVERAGE
from metro_megatron.cli.options import flatten, options_of
from metro_megatron.config.file import load_config
from metro_megatron.config.schema import MAY_CHANGE, Config
from metro_megatron.errors import UserError


def config_differences(saved: Config, given: Config) -> list[str]:
    """One line per field whose change would make another run of it."""
    there, here = flatten(saved), flatten(given)
    return [
        f"{option.name} is {here[option.name]!r}, but the checkpoint was made with {there[option.name]!r}"
        for option in options_of(Config)
        if MAY_CHANGE not in option.marks and here[option.name] != there[option.name]
    ]


def refuse_other_run(iteration: Path, config: Config) -> None:
    """Raise UserError if a checkpoint folder cannot be continued at all, or naming all differences if `config` does not
    continue its run."""
    if (iteration / AVERAGE).is_file():
        raise UserError(
            f"{iteration}: an average of checkpoints has weights, but neither moments nor a place in the data, so no "
            "run continues from it; continue from one of those it was made of, or turn it into a model with "
            "tools/convert_checkpoint.py"
        )
    found = config_differences(load_config(iteration / "run_config.yaml"), config)
    if found:
        raise UserError([*found, f"{iteration}: give the values of this checkpoint, or choose another train.output"])
