"""The encoders of METRO-LM: embeddings, post-LN or pre-LN layers with biased attention, main's and the auxiliary's.

Learned absolute positions and one table of relative-position biases per encoder, shared by its layers; the
configuration may say pre-LN, other positions, and what else the two encoders share.

Legend: B rows, S slots of a row, P positions of the model, H hidden, D width of the token table, N heads, K head
dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from .configuration_metro import EncoderSizes, MetroConfig
from .positions_metro import (
    MetroBiasTable,
    MetroPositionTable,
    MetroRowTurn,
    MetroUntiedPositions,
    at_positions,
    relative_buckets,
)

INIT_TARGETS = {
    "ffn": ("intermediate", "output"),
    "ffn_out": ("output",),
    "residual_out": ("attention.output", "output"),
    "none": (),
}
"""Matrices of layer l (0-based) that start divided by sqrt(2 (l + 1)) (METRO eq. 10)."""

SHARED_EMBEDDINGS = {
    "none": (),
    "token": ("word_embeddings",),
    "token_position": ("word_embeddings", "position_embeddings"),
    "token_position_norm": ("word_embeddings", "position_embeddings", "norm"),
}
"""Parts of the main encoder's embeddings that are the auxiliary encoder's, too."""


def readable(x: Tensor) -> bool:
    """Whether x has numbers that a check may look at: none while compiling, on the meta device, in fake tensors."""
    return not (torch.compiler.is_compiling() or x.is_meta or is_fake(x))


def encoder_sizes(config: MetroConfig, is_auxiliary: bool) -> EncoderSizes:
    """Of one of the two encoders."""
    return config.auxiliary if is_auxiliary else config.main


class MetroEmbeddings(nn.Module):
    """drop(LN(E[token] + P[position])), without P where positions are untied.

    An encoder of another width than the token table projects it, x W + b. An auxiliary encoder has a token embedding of
    its own only where the encoders share none.
    """

    def __init__(self, config: MetroConfig, is_auxiliary: bool):
        super().__init__()
        self.max_length = config.max_position_embeddings
        width, hidden_size = config.table_width, encoder_sizes(config, is_auxiliary).hidden_size
        self.adds_positions = not config.untied_positions
        if not is_auxiliary or not SHARED_EMBEDDINGS[config.shared_embeddings]:
            self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        if self.adds_positions:
            self.position_embeddings = MetroPositionTable(config.max_position_embeddings, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(0.0 if is_auxiliary else config.hidden_dropout_prob)
        self.projection = nn.Linear(width, hidden_size) if width != hidden_size else nn.Identity()

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Token embeddings [B, S, D] to the input of layer 0 [B, S, H]; position_ids [R, S], None: 0 ... S - 1."""
        if position_ids is None:
            length = inputs_embeds.size(1)
            if length > self.max_length:
                raise ValueError(
                    f"a row has {length} tokens, the model has {self.max_length} positions; "
                    f"tokenize with truncation=True, max_length={self.max_length}"
                )
            position_ids = torch.arange(length, device=inputs_embeds.device)
        if self.adds_positions:
            inputs_embeds = inputs_embeds + self.position_embeddings(position_ids)
        return self.projection(self.dropout(self.norm(inputs_embeds)))


class MetroAttention(nn.Module):
    """Multi-head attention with an additive bias; the softmax is computed in FP32 (or FP64).

    Scores are divided by sqrt(K), or by sqrt(2 K) where the bias has TUPE's term, which is the other half of them.
    """

    def __init__(self, config: MetroConfig, is_auxiliary: bool):
        super().__init__()
        self.config = config
        sizes = encoder_sizes(config, is_auxiliary)
        self.num_heads = sizes.num_attention_heads
        self.dropout = 0.0 if is_auxiliary else config.attention_probs_dropout_prob
        width = sizes.hidden_size // sizes.num_attention_heads
        self.scale = (width * (2 if config.untied_positions else 1)) ** -0.5
        self.query = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.key = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.value = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.output = nn.Linear(sizes.hidden_size, sizes.hidden_size)

    def forward(self, hidden: Tensor, bias: Tensor, output_attentions: bool) -> tuple[Tensor, Tensor | None]:
        """hidden [B, S, H] and bias [1 or B, N, S, S] to [B, S, H] and, if asked for, probabilities [B, N, S, S]."""
        q, k, v = (self._split(layer(hidden)) for layer in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        probabilities = None
        if self.config._attn_implementation == "sdpa" and not output_attentions:
            context = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale
            )
        else:
            wide = torch.promote_types(q.dtype, torch.float32)
            scores = (q @ k.transpose(-1, -2)).to(wide) * self.scale + bias
            probabilities = scores.softmax(dim=-1).to(v.dtype)
            context = functional.dropout(probabilities, dropout) @ v
        # A copy even where the kernel's result is in this order: torch.export records no other, and then decomposes the
        # kernel into operations whose result is not.
        context = context.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return self.output(context.flatten(2)), probabilities if output_attentions else None

    def _split(self, x: Tensor) -> Tensor:
        """[B, S, H] to [B, N, S, K]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MetroLayer(GradientCheckpointingLayer):
    """x <- LN(x + drop(attention(x))), then x <- LN(x + drop(W2 gelu(W1 x))); exact GELU.

    Pre-LN: x <- x + drop(attention(LN(x))), then x <- x + drop(W2 gelu(W1 LN(x))).
    """

    def __init__(self, config: MetroConfig, index: int, is_auxiliary: bool):
        super().__init__()
        self.norm_first = config.norm_first
        sizes = encoder_sizes(config, is_auxiliary)
        self.attention = MetroAttention(config, is_auxiliary)
        self.attention_norm = nn.LayerNorm(sizes.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.output = nn.Linear(sizes.intermediate_size, sizes.hidden_size)
        self.output_norm = nn.LayerNorm(sizes.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(0.0 if is_auxiliary else config.hidden_dropout_prob)
        for name in INIT_TARGETS[config.scaled_init_targets]:
            self.get_submodule(name).init_scale = (2 * (index + 1)) ** -0.5

    def forward(self, hidden: Tensor, bias: Tensor, output_attentions: bool) -> tuple[Tensor, Tensor | None]:
        """See `MetroAttention.forward`."""
        if self.norm_first:
            attended, probabilities = self.attention(self.attention_norm(hidden), bias, output_attentions)
            hidden = hidden + self.dropout(attended)
            changed = self.output(functional.gelu(self.intermediate(self.output_norm(hidden))))
            return hidden + self.dropout(changed), probabilities
        attended, probabilities = self.attention(hidden, bias, output_attentions)
        hidden = self.attention_norm(hidden + self.dropout(attended))
        changed = self.output(functional.gelu(self.intermediate(hidden)))
        return self.output_norm(hidden + self.dropout(changed)), probabilities


class MetroEncoder(nn.Module):
    """The layers, what they share of positions, and with pre-LN the last norm."""

    def __init__(self, config: MetroConfig, is_auxiliary: bool):
        super().__init__()
        self.config = config
        sizes = encoder_sizes(config, is_auxiliary)
        if config.relative_bucket != "none":
            self.relative_attention_bias = MetroBiasTable(config, sizes.num_attention_heads)
        if config.untied_positions:
            self.untied_positions = MetroUntiedPositions(config, sizes)
        self.layer = nn.ModuleList(MetroLayer(config, index, is_auxiliary) for index in range(sizes.num_layers))
        if config.norm_first:
            self.last_norm = nn.LayerNorm(sizes.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """hidden [B, S, H]; attention_mask and position_ids: see `encode`; None: as the configuration says.

        With pre-LN, the last of hidden_states is normed, those before it are the stream between the layers.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        bias = _masked(self._bias(hidden, position_ids), attention_mask, position_ids)
        states, attentions = [hidden], []
        for layer in self.layer:
            hidden, probabilities = layer(hidden, bias, output_attentions)
            states.append(hidden)
            attentions.append(probabilities)
        if self.config.norm_first:
            hidden = states[-1] = self.last_norm(hidden)
        return BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _bias(self, hidden: Tensor, position_ids: Tensor | None) -> Tensor:
        """[R, N or 1, S, S] of (row, head, query, key)."""
        length = hidden.size(1) if position_ids is None else self.config.max_position_embeddings
        if self.config.relative_bucket == "none":
            bias = hidden.new_zeros(1, 1, length, length)
        else:
            buckets = relative_buckets(self.config, length, hidden.device)
            bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None].to(hidden)
        if self.config.untied_positions:
            bias = bias + self.untied_positions(length, hidden.device).to(hidden)
        return bias if position_ids is None else at_positions(bias, position_ids)


def _masked(bias: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """The bias [R, N, S, S] with a number that makes a probability 0 for keys that a query does not see.

    The number is half the lowest finite one: added to a score, it stays finite where a row has no token at all.
    """
    unseen = torch.finfo(bias.dtype).min / 2
    seen = None
    if attention_mask is not None and attention_mask.dim() == 3:
        attention_mask = attention_mask[:, None]
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.is_floating_point():
        return bias + attention_mask.to(bias.dtype).clamp(min=unseen)
    if attention_mask is not None:
        seen = attention_mask.bool()
        seen = seen[:, None, None, :] if seen.dim() == 2 else seen
    if position_ids is not None and (attention_mask is None or attention_mask.dim() == 2):
        sample = (position_ids == 0).cumsum(dim=-1)
        same = (sample[:, :, None] == sample[:, None, :])[:, None]
        seen = same if seen is None else seen & same
    return bias if seen is None else bias.masked_fill(~seen, unseen)


def encode(
    stack: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **outputs: bool | None,
) -> BaseModelOutput:
    """What stack.embeddings and stack.encoder make of token embeddings [B, S, D]; `outputs` are output_... of these.

    attention_mask: [B, S], 0 where there is no token; or [B, S, S] or [B, 1, S, S], 0 or False where a query (first)
    does not see a key, or as floats that are added to the scores; 1 instead of the first S where all queries see the
    same. position_ids [B or 1, S] begin at 0 with every sample of a row, and tokens see their own sample only, unless a
    mask of pairs says what they see. Without position_ids a row is one sample, whose first token is the first that
    attention_mask [B, S] shows.
    Raises ValueError for rows or positions beyond the model's, and for a mask of another shape.
    """
    _check(stack.embeddings.max_length, inputs_embeds.shape[:2], attention_mask, position_ids)
    if position_ids is not None or attention_mask is None or attention_mask.dim() != 2:
        embedded = stack.embeddings(inputs_embeds, position_ids)
        return stack.encoder(embedded, attention_mask, position_ids, **outputs)
    rows = MetroRowTurn(attention_mask)
    found = stack.encoder(stack.embeddings(rows.turn(inputs_embeds)), rows.turn(attention_mask), **outputs)
    return BaseModelOutput(
        last_hidden_state=rows.turn_back(found.last_hidden_state),
        hidden_states=found.hidden_states and tuple(map(rows.turn_back, found.hidden_states)),
        attentions=found.attentions and tuple(map(rows.turn_back_pairs, found.attentions)),
    )


def _check(max_length: int, rows: torch.Size, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    """See `encode`."""
    length = rows[1]
    shapes = [rows] if attention_mask is not None and attention_mask.dim() == 2 else [(length, length), (1, length)]
    if attention_mask is not None and attention_mask.shape[-2:] not in shapes:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, must be {tuple(rows)}, or of pairs "
            f"{(rows[0], length, length)} or {(rows[0], 1, length, length)}"
        )
    if position_ids is None:
        return
    if position_ids.dim() != 2 or position_ids.size(1) != length:
        raise ValueError(f"position_ids are {tuple(position_ids.shape)}, must be {tuple(rows)} or {(1, length)}")
    if readable(position_ids) and position_ids.numel():
        lowest, highest = int(position_ids.min()), int(position_ids.max())
        if lowest < 0 or highest >= max_length:
            raise ValueError(
                f"position_ids are from {lowest} to {highest}, the model has positions 0 to {max_length - 1}; "
                "every sample begins at 0"
            )


class MetroAuxiliaryEncoder(nn.Module):
    """The auxiliary model's encoder, without dropout; `tied_weights` says what of it is the main model's."""

    def __init__(self, config: MetroConfig):
        super().__init__()
        self.embeddings = MetroEmbeddings(config, is_auxiliary=True)
        self.encoder = MetroEncoder(config, is_auxiliary=True)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **outputs: bool | None,
    ) -> BaseModelOutput:
        """inputs_embeds [B, S, D] to hidden states [B, S, H]; see `encode`."""
        return encode(self, inputs_embeds, attention_mask, position_ids, **outputs)
