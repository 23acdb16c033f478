"""Documents to datasets of token ids: PREFIX_00000.bin and .idx ..., PREFIX.manifest.json, PREFIX.tokenizer/."""

from metro_megatron.commands.preprocess_data import run

if __name__ == "__main__":
    run()
