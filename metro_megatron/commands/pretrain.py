"""Pretrain METRO-LM: torchrun --nproc-per-node N --no-python metro-pretrain --config YAML --data.train PREFIX..."""

import sys
from typing import NoReturn

from metro_megatron.cli.command_line import exit_code, is_first_process
from metro_megatron.train.launch import pretrain


def run() -> NoReturn:
    """The console script, and pretrain_metro.py."""
    sys.exit(exit_code(lambda: pretrain(sys.argv[1:]), report=is_first_process()))
