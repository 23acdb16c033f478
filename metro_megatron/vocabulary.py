"""What is known of every vocabulary: its first ids, and how many rows the token embedding has."""

BOS_ID, PAD_ID, EOS_ID, UNK_ID, MASK_ID = range(5)
NUM_SPECIALS = 5
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""Strings of ids 0 ... 4."""

VOCABULARY_MULTIPLE = 128
"""The embedding has a multiple of this many rows in every layout, so that checkpoints fit all of them."""


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the token embedding: vocab_size rounded up."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
