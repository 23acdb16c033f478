"""Pretrain METRO-LM: torchrun --nproc-per-node N --no-python metro-pretrain --config YAML --data.train PREFIX..."""

import sys
from typing import NoReturn

from metro_megatron.cli.command_line import call_with_options, exit_code
from metro_megatron.cli.options import options_of
from metro_megatron.commands.rehearse import Options, rehearse
from metro_megatron.errors import UserError
from metro_megatron.train.launch import pretrain

DRY_RUN = "--dry_run"


def run() -> NoReturn:
    """The console script, and pretrain_metro.py."""
    argv = sys.argv[1:]
    if DRY_RUN in argv:
        others = [token for token in argv if token != DRY_RUN]
        sys.exit(exit_code(lambda: call_with_options(rehearse, others)))
    sys.exit(exit_code(lambda: _pretrain(argv)))


def _pretrain(argv: list[str]) -> None:
    own = {f"--{option.name}" for option in options_of(Options)}
    given = [name for token in argv if (name := token.partition("=")[0]) in own]
    if given:
        raise UserError(f"{', '.join(given)}: of a rehearsal; give {DRY_RUN}, too, or leave it out")
    pretrain(argv)
