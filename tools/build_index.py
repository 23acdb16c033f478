"""The sample indices of a pretraining run, built before it: pretrain_metro.py finds them, or builds them itself."""

from metro_megatron.commands.build_index import run

if __name__ == "__main__":
    run()
