"""Frozen features: means of hidden states over the tokens of a piece.

Legend: P pieces of all texts in order, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metro_megatron.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as ids without specials, and where their pieces lie."""

    ids: list[NDArray[np.int64]]
    """Of each text, one at least."""
    borders: list[NDArray[np.int64]]
    """Of each text, where its pieces begin, and where the last one ends; those that are cut off are empty."""
    first_piece: NDArray[np.int64]
    """[texts + 1] number of each text's first piece; the last entry is P."""
    num_cut: int
    """Texts that were longer."""

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]], tokenizer: Tokenizer, longest: int) -> EncodedTexts:
        """Texts of pieces, each encoded by itself as no token crosses a space, cut at so many tokens."""
        ids, borders, num_cut = [], [], 0
        for text in texts:
            pieces = [*tokenizer.encode_batch(text[:1]), *tokenizer.encode_following(text[1:])]
            ends = np.cumsum([0, *map(len, pieces)])
            num_cut += int(ends[-1] > longest)
            ids.append(np.fromiter(chain.from_iterable(pieces), np.int64, ends[-1])[:longest])
            borders.append(ends.clip(max=longest))
        return cls(ids, borders, np.cumsum([0, *map(len, texts)]), num_cut)

    @property
    def num_pieces(self) -> int:
        """P."""
        return int(self.first_piece[-1])

    def pieces(self, texts: Sequence[int]) -> NDArray[np.int64]:
        """Numbers of all pieces of these texts, in their order."""
        return np.concatenate([np.arange(self.first_piece[one], self.first_piece[one + 1]) for one in texts])

    def means(self, hidden: Tensor, texts: Sequence[int], cells: Sequence[int]) -> Tensor:
        """[pieces of texts, H] float32 means of hidden [cells, H]: text texts[i] has its first token at cells[i].

        A piece without a token is zero. A matrix product, as scattered sums on a GPU have no fixed order.
        """
        weights = np.zeros((len(self.pieces(texts)), len(hidden)), np.float32)
        row = 0
        for text, cell in zip(texts, cells, strict=True):
            borders = self.borders[text]
            for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
                if end > begin:
                    weights[row, cell + begin : cell + end] = 1.0 / (end - begin)
                row += 1
        # Padding is multiplied by 0, and must be finite for that.
        return torch.from_numpy(weights).to(hidden.device) @ torch.nan_to_num(hidden.float())
