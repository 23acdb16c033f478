"""The tokenizer: training it, running it, and what it makes of a corpus."""
