"""Datasets of token ids joined into one, such as the parts written by the tasks of a Slurm array."""

from metro_megatron.commands.merge_shards import run

if __name__ == "__main__":
    run()
