"""What a run costs: parameters, FLOPs, memory, time, and the best layout for a number of GPUs."""

from metro_megatron.commands.plan import run

if __name__ == "__main__":
    run()
