"""Documents to a tokenizer folder: tokenizer.model, the equal tokenizer.json, tokenizer_config.json, report.json."""

from metro_megatron.commands.train_tokenizer import run

if __name__ == "__main__":
    run()
