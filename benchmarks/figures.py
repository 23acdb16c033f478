"""Bytes and floating point operations that a benchmark divides by time: closed forms of what must be moved or done.

Legend: T tokens, H hidden, F feed-forward, N heads, K head dimension, L length of a sample, n samples,
E = n N L^2 scores, M masked rows, V vocabulary. bf16: 2 bytes a number. Recomputation is
not counted, but for attention's scores in backward, as is usual.
"""

from collections.abc import Sequence
from dataclasses import dataclass

BYTES = 2


@dataclass(frozen=True)
class Work:
    """Of one forward and one backward pass, in bytes (GB/s) or operations (TFLOP/s)."""

    forward: float
    backward: float
    unit: str
    formula: str

    @property
    def both(self) -> float:
        return self.forward + self.backward

    def rate(self, amount: float, milliseconds: float) -> float:
        """GB/s or TFLOP/s."""
        return amount / (milliseconds * 1e-3) / (1e9 if self.unit == "GB/s" else 1e12)


def layer_norm_work(tokens: int, hidden: int) -> Work:
    """Forward reads x and residual, writes y and the sum that is saved; backward reads the gradient and that sum,
    writes two gradients. The dropout mask is not stored."""
    amount = 4.0 * tokens * hidden * BYTES
    return Work(amount, amount, "GB/s", "8TH | 8TH bytes")


def softmax_dropout_work(samples: int, heads: int, length: int) -> Work:
    """Forward reads scores, writes the probabilities that are saved and those after dropout; backward reads the
    gradient and the saved ones, writes a gradient."""
    amount = 3.0 * samples * heads * length**2 * BYTES
    return Work(amount, amount, "GB/s", "6E | 6E bytes")


def attention_work(heads: int, head_dim: int, lengths: Sequence[int]) -> Work:
    """Two products forward and five backward, of real tokens."""
    product = 2.0 * heads * head_dim * sum(length**2 for length in lengths)
    return Work(2 * product, 5 * product, "TFLOP/s", "4NK sum(L^2) | 10NK sum(L^2) FLOP")


def linear_cross_entropy_work(rows: int, hidden: int, vocab: int) -> Work:
    """One product forward and two backward; logits that backward makes again are not counted."""
    product = 2.0 * rows * hidden * vocab
    return Work(product, 2 * product, "TFLOP/s", "2MHV | 4MHV FLOP")
