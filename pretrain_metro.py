"""Pretrain METRO-LM.

torchrun --nproc-per-node N pretrain_metro.py --config YAML --data.train PREFIX... --train.output DIR
"""

from metro_megatron.commands.pretrain import run

if __name__ == "__main__":
    run()
