"""Turn a training checkpoint into a folder for transformers."""

from metro_megatron.commands.convert_checkpoint import run

if __name__ == "__main__":
    run()
