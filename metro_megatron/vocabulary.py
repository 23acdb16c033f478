"""What is known of every vocabulary: which of its ids are no words, and how many rows the token embedding has."""

from dataclasses import dataclass
from typing import Any

BOS_ID, PAD_ID, EOS_ID, UNK_ID, MASK_ID = range(5)
NUM_SPECIALS = 5
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""Strings of ids 0 ... 4 in the tokenizers of tools/train_tokenizer.py; those of others have `SpecialIds` of theirs."""

VOCABULARY_MULTIPLE = 128
"""The embedding has a multiple of this many rows in every layout, so that checkpoints fit all of them."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of a tokenizer that are no words; by default those of tools/train_tokenizer.py.

    They come from the tokenizer, stand in the manifest of a dataset and in the configuration of a run and of an export.
    """

    bos: int = BOS_ID
    """Before every sample: `<s>`, BERT's `[CLS]`."""
    pad: int = PAD_ID
    eos: int = EOS_ID
    """Behind every sample: `</s>`, BERT's `[SEP]`."""
    mask: int = MASK_ID
    others: tuple[int, ...] = (UNK_ID,)
    """Ascending: of unknown words, which text may hold, and what else the tokenizer calls special."""

    @property
    def all(self) -> tuple[int, ...]:
        """Ascending. None of them is ever drawn."""
        return tuple(sorted({self.bos, self.pad, self.eos, self.mask, *self.others}))

    @property
    def reserved(self) -> tuple[int, ...]:
        """Ascending: those that no text has."""
        return tuple(sorted({self.bos, self.pad, self.eos, self.mask}))

    @property
    def first_word(self) -> int:
        """How many ids from 0 on are special."""
        return next(number for number, one in enumerate((*self.all, -1)) if number != one)

    @property
    def scattered(self) -> tuple[int, ...]:
        """Special ids behind the first word, ascending."""
        return self.all[self.first_word :]

    def num_words(self, vocab_size: int) -> int:
        """Ids below vocab_size that are words."""
        return vocab_size - len(self.all)

    def word(self, number: Any) -> Any:
        """Ids of words by their numbers among the words; an array of NumPy's or a tensor."""
        for one in self.all:
            number = number + (number >= one)
        return number

    def number(self, word: Any) -> Any:
        """The inverse of `word`; of a special id the number of the next word."""
        return word - sum((word > one) * 1 for one in self.all)


TRAINED_IDS = SpecialIds()
"""Those of tools/train_tokenizer.py."""


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the token embedding: vocab_size rounded up."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
