"""Pretrain METRO-LM.

torchrun --nproc-per-node N pretrain_metro.py --config YAML --data.train PREFIX... --train.output DIR
"""

import sys

from metro_megatron.cli.command_line import exit_code
from metro_megatron.train.launch import is_first_process, pretrain

if __name__ == "__main__":
    sys.exit(exit_code(lambda: pretrain(sys.argv[1:]), report=is_first_process()))
