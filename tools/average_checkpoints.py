"""Average the weights of checkpoints."""

from metro_megatron.commands.average_checkpoints import run

if __name__ == "__main__":
    run()
