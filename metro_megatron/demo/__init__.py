"""The demonstration: real text to a fine-tuned model in named stages, and what came out of it."""
