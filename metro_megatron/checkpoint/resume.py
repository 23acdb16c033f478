"""What must be equal for a run to be the continuation of another."""

from pathlib import Path

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
    """Raise UserError naming all differences if `config` does not continue the run of a checkpoint folder."""
    found = config_differences(load_config(iteration / "run_config.yaml"), config)
    if found:
        raise UserError([*found, f"{iteration}: give the values of this checkpoint, or choose another train.output"])
