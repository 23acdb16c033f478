"""Tokenized documents: what samples are cut from, whether they come from a shard or from text at hand."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenizedDocuments:
    """Consecutive documents of one dataset: D documents of U units of T tokens, in memory or mapped from the disk."""

    tokens: NDArray[np.integer]
    """[T] ids of all units one after another, without specials; may be empty where only lengths are asked for."""
    unit_lengths: NDArray[np.integer]
    """[U] tokens of each unit."""
    document_index: NDArray[np.int64]
    """[D + 1] document d is units document_index[d] to document_index[d + 1]."""
    dataset: str = ""
    """Prefix of the dataset they belong to; empty for documents of none."""
    first_document: int = 0
    """Number of the first document in the dataset."""
    checksums: NDArray[np.uint32] | None = None
    """Of every block of the tokens, as data/blocks.py has them; None where there are none."""

    @classmethod
    def from_units(cls, documents: Iterable[Sequence[Sequence[int]]]) -> Self:
        """Documents in memory, each given as the ids of its units."""
        units: list[Sequence[int]] = []
        ends = [0]
        for document in documents:
            units += document
            ends.append(len(units))
        ids = [np.asarray(unit, np.int64) for unit in units]
        lengths = np.fromiter(map(len, units), np.int64, len(units))
        return cls(np.concatenate([np.empty(0, np.int64), *ids]), lengths, np.asarray(ends, np.int64))

    @property
    def name(self) -> str:
        """What messages call the tokens."""
        return self.dataset

    @property
    def num_documents(self) -> int:
        return len(self.document_index) - 1
