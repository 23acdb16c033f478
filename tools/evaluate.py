"""Evaluate an exported pair on held-out text: fill, detect, correct."""

from metro_megatron.commands.evaluate import run

if __name__ == "__main__":
    run()
