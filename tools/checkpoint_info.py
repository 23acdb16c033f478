"""What a checkpoint holds, whether it is whole, and in what it differs from another."""

from metro_megatron.commands.checkpoint_info import run

if __name__ == "__main__":
    run()
