"""Say whether runs of one arm score higher than those of another, seed by seed."""

from metro_megatron.commands.compare_runs import run

if __name__ == "__main__":
    run()
