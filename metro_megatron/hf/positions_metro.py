"""Where tokens of METRO-LM's encoders stand in their samples, and what that adds to attention.

A row is one sample whose first token, <s>, stands at position 0. Padding may stand on its right or on its left. Several
samples in one row (packed) need position_ids, which begin at 0 with each.

Legend: B rows, R rows or 1 for all, S slots of a row, P positions of the model, H hidden, N heads, K head dimension,
b buckets.
"""

import math

import torch
from torch import Tensor, nn

from .configuration_metro import EncoderSizes, MetroConfig


def coco_buckets(config: MetroConfig) -> tuple[Tensor, int]:
    """`buckets` of COCO-LM: rounded up, ids in the order of the positions, the smallest is 0; b - 1 is unused."""
    relative, distance, side = _distances(config)
    exact = side // 2
    share = torch.log(distance.clamp(min=1).double() / exact)
    share = share / math.log((config.relative_attention_max_distance - 1) / exact)
    bucket = exact + (share * (side - 1 - exact)).ceil().long()
    bucket = torch.where(distance < exact, distance, bucket.clamp(max=side - 1)) * relative.sign()
    return bucket - bucket.min(), config.relative_attention_num_buckets - 1


def t5_buckets(config: MetroConfig) -> tuple[Tensor, int]:
    """`buckets` of T5: rounded down, later keys in the upper half; b / 2 is unused."""
    relative, distance, side = _distances(config)
    exact = side // 2
    share = torch.log(distance.clamp(min=1).double() / exact)
    share = share / math.log(config.relative_attention_max_distance / exact)
    bucket = exact + (share * (side - exact)).floor().long()
    bucket = torch.where(distance < exact, distance, bucket.clamp(max=side - 1))
    return bucket + side * (relative > 0), side


def _distances(config: MetroConfig) -> tuple[Tensor, Tensor, int]:
    """Relative positions -(P - 1) ... P - 1, P = max_position_embeddings, their distances, and buckets of a side."""
    positions = config.max_position_embeddings
    relative = torch.arange(1 - positions, positions, device="cpu")
    return relative, relative.abs(), config.relative_attention_num_buckets // 2


BUCKETS = {"coco": coco_buckets, "t5": t5_buckets}


def buckets(config: MetroConfig) -> tuple[Tensor, int]:
    """Bucket of every relative position -(P - 1) ... P - 1 (key minus query), and the bucket that none is in.

    The lower half of each side's b / 2 buckets is exact, the upper half logarithmic up to the largest distance.
    Double precision on the CPU, whatever the model runs in.
    """
    return BUCKETS[config.relative_bucket](config)


def distance_buckets(config: MetroConfig) -> Tensor:
    """Bucket of every relative position -(P - 1) ... P - 1, P = max_position_embeddings."""
    return buckets(config)[0]


def relative_buckets(config: MetroConfig, length: int, device: torch.device) -> Tensor:
    """Row of the bias table for every (query, key), [S, S].

    Where position 0 is reset (TUPE's "reset [CLS]"), as a query it reads the row that no distance uses, as a key of
    others the additional row b.
    """
    position = torch.arange(length, device=device)
    relative = position[None, :] - position[:, None]
    of_distance, unused = buckets(config)
    rows = of_distance.to(device)[relative + config.max_position_embeddings - 1]
    if config.reset_cls:
        rows[:, 0] = config.relative_attention_num_buckets
        rows[0, :] = unused
    return rows


class MetroBiasTable(nn.Embedding):
    """Relative-position biases of one encoder, [b + 1, N], or [b, N] where position 0 is not reset."""

    def __init__(self, config: MetroConfig, num_heads: int):
        super().__init__(config.relative_attention_num_buckets + config.reset_cls, num_heads)
        self.config = config

    def decaying(self) -> Tensor:
        """A start that is not METRO's: -2^-h times the smallest distance of a bucket; 0 for <s>."""
        places = self.config.max_position_embeddings
        of_distance = distance_buckets(self.config)
        if self.config.reset_cls:  # between positions other than that of <s>
            of_distance = of_distance[1:-1]
        distance = (torch.arange(len(of_distance), device="cpu") - len(of_distance) // 2).abs()
        smallest = torch.full((self.num_embeddings,), places)
        smallest.scatter_reduce_(0, of_distance, distance, "amin")
        smallest[smallest == places] = 0
        return -smallest[:, None] * 2.0 ** -torch.arange(self.embedding_dim)


class MetroUntiedPositions(nn.Module):
    """TUPE's term of scores: (LN(P) U + u) (LN(P) W + w)^T / sqrt(2 K), of positions alone and per head.

    Where position 0 is reset, two rows of P stand before those of the sample: row 0 with itself makes the score of <s>
    to all, row 1 that of all others to <s>, and position 0 reads no other, so that P has one row more.
    """

    def __init__(self, config: MetroConfig, sizes: EncoderSizes):
        super().__init__()
        hidden_size = sizes.hidden_size
        self.num_heads = sizes.num_attention_heads
        self.reset_cls = config.reset_cls
        self.position_embeddings = nn.Embedding(config.max_position_embeddings + config.reset_cls, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)

    def forward(self, length: int, device: torch.device) -> Tensor:
        """[N, S, S] of (head, query, key) for positions 0 ... S - 1."""
        rows = torch.arange(length + self.reset_cls, device=device)
        normed = self.norm(self.position_embeddings(rows))
        q, k = (layer(normed).unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for layer in (self.query, self.key))
        term = q @ k.transpose(1, 2) * (2 * q.size(-1)) ** -0.5
        if not self.reset_cls:
            return term
        of_query, of_key = term[:, :1, :1], term[:, 1:2, 1:2]
        below = torch.cat([of_key.expand(-1, length - 1, 1), term[:, 2:, 2:]], dim=2)
        return torch.cat([of_query.expand(-1, 1, length), below], dim=1)


class MetroPositionTable(nn.Embedding):
    """Learned absolute positions [P, D]."""


def at_positions(bias: Tensor, position_ids: Tensor) -> Tensor:
    """What a bias [1, N, P, P] of all pairs of positions is between the slots of rows, [R, N, S, S].

    position_ids [R, S] are smaller than P; slots of different samples read some pair, which is masked afterwards.
    """
    return bias[0][:, position_ids[:, :, None], position_ids[:, None, :]].transpose(0, 1)


class MetroRowTurn:
    """Turns rows with padding on their left around, so that their samples stand at position 0, and results back.

    Rows of the two kinds of padding are then the same tensors. attention_mask [B, S] is 0 where there is no token.
    """

    def __init__(self, attention_mask: Tensor):
        num_rows, length = attention_mask.shape
        slot = torch.arange(length, device=attention_mask.device)
        first = attention_mask.ne(0).int().argmax(dim=-1, keepdim=True)
        self.row = torch.arange(num_rows, device=attention_mask.device)[:, None]
        there, back = slot + first, slot - first  # around the ends of the row
        self.there = torch.where(there < length, there, there - length)
        self.back = torch.where(back < 0, back + length, back)

    def turn(self, x: Tensor) -> Tensor:
        """x [B, S, ...] with every row's first token in slot 0."""
        return x[self.row, self.there]

    def turn_back(self, x: Tensor) -> Tensor:
        """x [B, S, ...] with every row's first token where it stood."""
        return x[self.row, self.back]

    def turn_back_pairs(self, x: Tensor) -> Tensor:
        """x [B, N, S, S] of (head, query, key) likewise."""
        queries = self.turn_back(x.permute(0, 2, 3, 1))  # [B, S, S, N]
        return self.turn_back(queries.transpose(1, 2)).permute(0, 3, 2, 1)
