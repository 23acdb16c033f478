"""Means over pieces, wherever their texts lie in a batch."""

from pathlib import Path

import numpy as np
import torch

from metro_megatron.probing.features import EncodedTexts
from metro_megatron.tokenizer.tokenizer import Tokenizer


def test_means_over_pieces(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    texts = [["a whole text of several words"], ["single", "words", "", "unbelievably"], ["x"]]
    found = EncodedTexts.of(texts, tokenizer, 8)
    whole = [tokenizer.encode(" ".join(filter(None, text))) for text in texts]
    assert [ids.tolist() for ids in found.ids] == [ids[:8] for ids in whole]
    assert found.num_cut == sum(len(ids) > 8 for ids in whole) and found.num_pieces == 6
    hidden = torch.randn(40, 3)
    hidden[39] = float("nan")  # padding
    means = found.means(hidden, [2, 1], [5, 20])
    assert found.pieces([2, 1]).tolist() == [5, 1, 2, 3, 4]
    lengths = [len(tokenizer.encode(word)) for word in texts[1]]
    begin = 20
    expected = [hidden[5 : 5 + len(whole[2])].mean(0)]
    for length in lengths:
        end = min(begin + length, 28)
        expected.append(hidden[begin:end].mean(0) if end > begin else torch.zeros(3))
        begin = end
    np.testing.assert_allclose(means, torch.stack(expected), atol=1e-6)
