"""A METRO pair in plain torch, as one would write it without this project: what the CPU step is measured against.

Of METRO's choices alone: post-LN, COCO-LM's buckets with reset [CLS], shared token embeddings, linear heads of main.
Each sample is a padded row. The language modelling heads look at masked positions only; the optimizer is torch's fused
AdamW.

Legend: B samples, L tokens of the longest, M masked positions, H hidden, N heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from metro_megatron.config.schema import Config, EncoderSizes, ModelConfig
from metro_megatron.data.batch import MicroBatch
from metro_megatron.vocabulary import NUM_SPECIALS, PAD_ID

FIXED = (
    *("relative_bucket", "untied_positions", "reset_cls", "norm_first", "shared_embeddings", "shared_lm_bias"),
    *("rtd_head", "lm_head", "embedding_size", "auxiliary_dropout"),
    *("auxiliary_hidden_size", "auxiliary_num_attention_heads", "auxiliary_ffn_hidden_size"),
)
"""Options of the model that must be METRO's, the default."""


@dataclass(frozen=True)
class PaddedBatch:
    """Samples, each in a row of its own."""

    tokens: Tensor
    """int64 [B, L] original ids, PAD_ID behind a sample's end."""
    masked_tokens: Tensor
    """int64 [B, L] the same with MASK_ID at masked positions."""
    masked: Tensor
    """int64 [M] indices of the masked positions among B L."""

    @classmethod
    def of(cls, micro_batch: MicroBatch) -> PaddedBatch:
        """The samples of a packed row, in its order."""
        lengths = [length for length in micro_batch.sample_lengths.tolist() if length]

        def pad(row: Tensor, value: int) -> Tensor:
            samples = row.flatten()[: sum(lengths)].split(lengths)
            return nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=value)

        masked = pad(micro_batch.is_masked, 0).flatten().nonzero()[:, 0]
        return cls(pad(micro_batch.tokens, PAD_ID), pad(micro_batch.masked_tokens, PAD_ID), masked)


class Layer(nn.Module):
    """Post-LN: attention and MLP, each dropped, added and normed."""

    def __init__(self, sizes: EncoderSizes, model: ModelConfig, dropout: tuple[float, float]):
        super().__init__()
        hidden = sizes.hidden_size
        self.num_heads = sizes.num_attention_heads
        self.hidden_dropout, self.attention_dropout = dropout
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.projection = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, model.layer_norm_eps)
        self.inner, self.outer = nn.Linear(hidden, sizes.ffn_hidden_size), nn.Linear(sizes.ffn_hidden_size, hidden)
        self.mlp_norm = nn.LayerNorm(hidden, model.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, H]; bias [B, N, L, L] is added to the scores."""
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)  # [B, N, L, K] each
        # Faster than scaled_dot_product_attention, which has no kernel for a bias that is learned.
        p = (q @ k.transpose(2, 3) * q.size(-1) ** -0.5 + bias).softmax(-1)
        attended = functional.dropout(p, self.attention_dropout, self.training) @ v
        x = self.attention_norm(x + self._drop(self.projection(attended.transpose(1, 2).flatten(2))))
        return self.mlp_norm(x + self._drop(self.outer(functional.gelu(self.inner(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.hidden_dropout, self.training)


class Encoder(nn.Module):
    """Embeddings but for the token table, layers, and the table of relative positions that they share."""

    def __init__(self, sizes: EncoderSizes, model: ModelConfig, dropout: tuple[float, float]):
        super().__init__()
        scheme, positions = model.position_scheme, model.max_position_embeddings
        assert scheme.buckets is not None and scheme.resets_cls
        self.position = nn.Embedding(positions, sizes.hidden_size)
        self.norm = nn.LayerNorm(sizes.hidden_size, model.layer_norm_eps)
        self.relative = nn.Embedding(scheme.num_rows, sizes.num_attention_heads)
        self.layers = nn.ModuleList(Layer(sizes, model, dropout) for _ in range(sizes.num_layers))
        self.hidden_dropout = dropout[0]
        place = torch.arange(positions)
        distance = (place - place[:, None]).clamp(-scheme.reach, scheme.reach) + scheme.reach
        rows = torch.tensor(scheme.distance_rows())[distance]
        rows[:, 0], rows[0] = scheme.cls_rows()[1], scheme.cls_rows()[0]
        self.rows: Tensor
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, embedded: Tensor, is_real: Tensor) -> Tensor:
        """embedded [B, L, H] tokens and is_real [B, L] to hidden states [B, L, H]."""
        length = embedded.size(1)
        x = functional.dropout(self.norm(embedded + self.position.weight[:length]), self.hidden_dropout, self.training)
        relative = self.relative(self.rows[:length, :length]).permute(2, 0, 1)  # [N, L, L]
        padding = torch.zeros(is_real.shape).masked_fill(~is_real, float("-inf"))
        bias = relative + padding[:, None, None]
        for layer in self.layers:
            x = layer(x, bias)
        return x


class PlainPair(nn.Module):
    """Auxiliary and main model; a step of both is `train_step`."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        main, auxiliary, hidden = model.main, model.auxiliary, model.hidden_size
        others = [name for name in FIXED if getattr(model, name) != getattr(ModelConfig(), name)]
        assert not others, f"METRO's choices alone: {others}"
        self.word = nn.Embedding(model.vocab_size, hidden)
        self.auxiliary = Encoder(auxiliary, model, (0.0, 0.0))
        self.main = Encoder(main, model, (model.hidden_dropout, model.attention_dropout))
        self.mlm = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden, model.layer_norm_eps))
        self.mlm_bias = nn.Parameter(torch.zeros(model.vocab_size))
        self.clm_bias = nn.Parameter(torch.zeros(model.vocab_size))
        self.rtd = nn.Linear(hidden, 1)
        self.apply(lambda module: _initialize(module, model.init_method_std))

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Sums of the losses of auxiliary, detection and correction, [3]."""
        logits = self.auxiliary_logits(batch)
        return torch.stack([auxiliary_loss(logits, batch), *self.main_losses(batch, sample(logits.detach()))])

    def auxiliary_logits(self, batch: PaddedBatch) -> Tensor:
        """[M, V]."""
        hidden = self.auxiliary(self.word(batch.masked_tokens), batch.tokens != PAD_ID)
        return functional.linear(self.mlm(hidden.flatten(0, 1)[batch.masked]), self.word.weight, self.mlm_bias)

    def main_losses(self, batch: PaddedBatch, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of replaced token detection and of correction, with sampled [M] ids at the masked positions."""
        is_real = batch.tokens != PAD_ID
        corrupted = batch.tokens.flatten().index_copy(0, batch.masked, sampled).view_as(batch.tokens)
        hidden = self.main(self.word(corrupted), is_real)
        is_original = (corrupted == batch.tokens).float()
        rtd = functional.binary_cross_entropy_with_logits(
            self.rtd(hidden)[..., 0], is_original, is_real.float(), reduction="sum"
        )
        logits = functional.linear(hidden.flatten(0, 1)[batch.masked], self.word.weight, self.clm_bias)
        return rtd, functional.cross_entropy(logits, _targets(batch), reduction="sum")


def auxiliary_loss(logits: Tensor, batch: PaddedBatch) -> Tensor:
    """Sum of the cross-entropies of the masked tokens; logits [M, V]."""
    return functional.cross_entropy(logits, _targets(batch), reduction="sum")


@torch.no_grad()
def sample(logits: Tensor) -> Tensor:
    """[M] ids drawn from the softmax over all ids but specials."""
    # Gumbel-max: faster than torch.multinomial.
    noise = torch.rand_like(logits).log_().neg_().log_()
    return noise.sub_(logits).neg_()[:, NUM_SPECIALS:].argmax(-1) + NUM_SPECIALS


def optimizer_of(pair: PlainPair, config: Config) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay of matrices."""
    options = config.optimizer
    matrices = [parameter for parameter in pair.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in pair.parameters() if parameter.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    betas = (options.adam_beta1, options.adam_beta2)
    return torch.optim.AdamW(groups, options.lr, betas, options.adam_eps, options.weight_decay, fused=True)


def train_step(
    pair: PlainPair | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    config: Config,
    batches: Iterable[PaddedBatch],
) -> list[float]:
    """One optimizer step over micro batches; the mean losses of auxiliary, detection and correction.

    In DDP of all micro batches of all ranks, whose losses each has its own parts of.
    """
    batches = list(batches)
    masked = sum(len(batch.masked) for batch in batches)
    counts = torch.tensor([masked, sum(int((batch.tokens != PAD_ID).sum()) for batch in batches), masked])
    ranks = 1
    if isinstance(pair, DistributedDataParallel):
        dist.all_reduce(counts)
        ranks = dist.get_world_size()  # by which it divides gradients
    weights = torch.tensor([1.0, config.objective.rtd_weight, config.objective.clm_weight])
    sums = torch.zeros(3)
    optimizer.zero_grad()
    for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
        with pair.no_sync() if left and isinstance(pair, DistributedDataParallel) else nullcontext():
            losses = pair(batch) / counts
            (ranks * weights * losses).sum().backward()
        sums += losses.detach()
    nn.utils.clip_grad_norm_(pair.parameters(), config.optimizer.clip_grad)
    optimizer.step()
    return sums.tolist()


def _targets(batch: PaddedBatch) -> Tensor:
    return batch.tokens.flatten()[batch.masked]


def _initialize(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
