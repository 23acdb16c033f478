"""Attention probabilities: scale, relative bias, key padding, FP32 softmax and dropout in one place.

Legend: n sequences, N heads, Q queries, L keys.
"""

from torch import Tensor
from torch.nn import functional

MASKED_SCORE = -1e30
"""Score of a key that is not there: finite, so that a row without any key stays free of NaN."""


def softmax_dropout(scores: Tensor, bias: Tensor, is_key: Tensor, scale: float, dropout: float) -> Tensor:
    """Probabilities [n, N, Q, L] of raw scores q.k [n, N, Q, L], in the dtype of the scores.

    bias [N, Q, L] is added after scaling (METRO's relative position bias); is_key [n, L] is False for keys
    that do not exist. dropout is the rate, 0 for none.
    """
    x = scores.float() * scale + bias.float()
    x = x.masked_fill(~is_key[:, None, None, :], MASKED_SCORE)
    probabilities = x.softmax(dim=-1).to(scores.dtype)
    return functional.dropout(probabilities, dropout) if dropout > 0.0 else probabilities
