"""One page about this machine: what it has for pretraining, what works, what is missing, and what mends it."""

from metro_megatron.commands.doctor import run

if __name__ == "__main__":
    run()
