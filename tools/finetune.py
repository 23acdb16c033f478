"""Fine-tune an exported model on labelled texts."""

from metro_megatron.commands.finetune import run

if __name__ == "__main__":
    run()
