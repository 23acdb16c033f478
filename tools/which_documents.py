"""Say which documents a step of a run has read, or will read."""

from metro_megatron.commands.which_documents import run

if __name__ == "__main__":
    run()
