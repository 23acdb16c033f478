"""How many rows the token embedding has."""

VOCABULARY_MULTIPLE = 128
"""The embedding has a multiple of this many rows in every layout, so that checkpoints fit all of them."""


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the token embedding: vocab_size rounded up."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
