"""Ask an exported encoder, as it is, the tasks of a folder."""

from metro_megatron.commands.probe import run

if __name__ == "__main__":
    run()
