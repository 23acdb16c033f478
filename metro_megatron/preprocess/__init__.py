"""Documents to datasets of token ids."""
