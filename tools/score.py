"""Rank candidates in their prompts by a model's pretrained heads."""

from metro_megatron.commands.score import run

if __name__ == "__main__":
    run()
