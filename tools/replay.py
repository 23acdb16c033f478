"""Do a step of a run once more, on this machine alone, and show what it read and the loss of every token."""

from metro_megatron.commands.replay import run

if __name__ == "__main__":
    run()
