"""METRO-LM for transformers, in one file: this is what an exported folder carries, and what tests compare with.

Post-LN encoder with learned absolute positions and one table of relative-position biases per encoder, shared by
its layers; the configuration may say pre-LN, other positions, and what else the two encoders share. Samples stand at
the left of their rows: position 0 is <s>, padding is on the right.

Legend: B rows, S positions, H hidden, D width of the token table, N heads, K head dimension, V vocabulary, b buckets,
C labels.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .configuration_metro import EncoderSizes, MetroConfig

IGNORED = -100
"""Label of positions that have none."""

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


def encoder_sizes(config: MetroConfig, is_auxiliary: bool) -> EncoderSizes:
    """Of one of the two encoders."""
    return config.auxiliary if is_auxiliary else config.main


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

    def forward(self, length: int) -> Tensor:
        """[N, S, S] of (head, query, key)."""
        normed = self.norm(self.position_embeddings.weight[: length + self.reset_cls])
        q, k = (layer(normed).unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for layer in (self.query, self.key))
        term = q @ k.transpose(1, 2) * (2 * q.size(-1)) ** -0.5
        if not self.reset_cls:
            return term
        of_query, of_key = term[:, :1, :1], term[:, 1:2, 1:2]
        below = torch.cat([of_key.expand(-1, length - 1, 1), term[:, 2:, 2:]], dim=2)
        return torch.cat([of_query.expand(-1, 1, length), below], dim=1)


class MetroPositionTable(nn.Embedding):
    """Learned absolute positions [P, D]."""


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

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """Token embeddings [B, S, D] to the input of layer 0 [B, S, H]."""
        length = inputs_embeds.size(1)
        if length > self.max_length:
            raise ValueError(
                f"a row has {length} tokens, the model has {self.max_length} positions; "
                f"tokenize with truncation=True, max_length={self.max_length}"
            )
        if self.adds_positions:
            inputs_embeds = inputs_embeds + self.position_embeddings.weight[:length]
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
        return self.output(context.transpose(1, 2).flatten(2)), probabilities if output_attentions else None

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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """hidden [B, S, H] and attention_mask [B, S] (0 where there is no token); None: as the configuration says.

        With pre-LN, the last of hidden_states is normed, those before it are the stream between the layers.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        bias = self._bias(hidden, attention_mask)
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

    def _bias(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[1, N or 1, S, S], or [B, N or 1, S, S] with the lowest finite number where there is no key."""
        length = hidden.size(1)
        if self.config.relative_bucket == "none":
            bias = hidden.new_zeros(1, 1, length, length)
        else:
            buckets = relative_buckets(self.config, length, hidden.device)
            bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None].to(hidden.dtype)
        if self.config.untied_positions:
            bias = bias + self.untied_positions(length).to(hidden.dtype)
        if attention_mask is None:
            return bias
        if attention_mask.shape != hidden.shape[:2]:
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, must be {tuple(hidden.shape[:2])}")
        return bias.masked_fill(~attention_mask.bool()[:, None, None, :], torch.finfo(bias.dtype).min)


class MetroPreTrainedModel(PreTrainedModel):
    """What all classes share. A saved file may hold the whole pair: parts that a class has no use for are skipped."""

    config: MetroConfig
    config_class = MetroConfig
    base_model_prefix = "metro"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MetroEmbeddings", "MetroLayer"]
    _keys_to_ignore_on_load_unexpected = [
        r"^auxiliary\.",
        r"^(auxiliary|rtd|clm|cloze|mlm|start|end)_head\.",
        r"^classifier\.",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            scale = getattr(module, "init_scale", 1.0)
            nn.init.normal_(module.weight, std=self.config.initializer_range * scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module.weight, "_is_hf_initialized", False):
                return
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
            if isinstance(module, MetroPositionTable) and self.config.position_init == "zero":
                module.weight.zero_()
            if isinstance(module, MetroBiasTable) and module.config.relative_bias_init == "decay":
                module.weight.copy_(module.decaying())
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class MetroAuxiliaryEncoder(nn.Module):
    """The auxiliary model's encoder, without dropout; `tied_weights` says what of it is the main model's."""

    def __init__(self, config: MetroConfig):
        super().__init__()
        self.embeddings = MetroEmbeddings(config, is_auxiliary=True)
        self.encoder = MetroEncoder(config, is_auxiliary=True)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """inputs_embeds [B, S, D] to hidden states [B, S, H]; attention_mask [B, S]."""
        return self.encoder(self.embeddings(inputs_embeds), attention_mask, output_hidden_states, output_attentions)


class MetroModel(MetroPreTrainedModel):
    """The main encoder."""

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.embeddings = MetroEmbeddings(config, is_auxiliary=False)
        self.encoder = MetroEncoder(config, is_auxiliary=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.set_submodule("embeddings.word_embeddings", value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """input_ids [B, S] or inputs_embeds [B, S, D] to hidden states [B, S, H]; attention_mask [B, S]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        return self.encoder(self.embeddings(inputs_embeds), attention_mask, output_hidden_states, output_attentions)


class MetroCLMHead(nn.Module):
    """h E^T + b with the tied token embedding E (METRO eq. 8); H must be D."""

    def __init__(self, config: MetroConfig):
        super().__init__()
        self.decoder = nn.Linear(config.table_width, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] to logits [B, S, V]."""
        return self.decoder(hidden)


class MetroMLMHead(MetroCLMHead):
    """LN(gelu(h W + b)), of width D, before the tied decoder (METRO eq. 4, with COCO-LM's layers).

    The auxiliary model's head, and main's where config.lm_head is "dense".
    """

    def __init__(self, config: MetroConfig, is_auxiliary: bool):
        super().__init__(config)
        self.dense = nn.Linear(encoder_sizes(config, is_auxiliary).hidden_size, config.table_width)
        self.norm = nn.LayerNorm(config.table_width, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] to logits [B, S, V]."""
        return super().forward(self.norm(functional.gelu(self.dense(hidden))))


def main_lm_head(config: MetroConfig) -> MetroCLMHead:
    """As config.lm_head says. Raises ValueError where the token table cannot be the decoder."""
    if config.lm_head == "dense":
        return MetroMLMHead(config, is_auxiliary=False)
    if config.table_width != config.hidden_size:
        raise ValueError(
            f"lm_head is 'linear', its decoder is the token embedding of width {config.table_width}, which cannot read "
            f"hidden_size {config.hidden_size}; choose lm_head 'dense'"
        )
    return MetroCLMHead(config)


class MetroDenseTokenHead(nn.Linear):
    """One logit of gelu(h W + b) for every position (ELECTRA's discriminator)."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] to [B, S, 1]."""
        return super().forward(functional.gelu(self.dense(hidden)))


def detection_head(config: MetroConfig) -> nn.Linear:
    """Hidden states to one logit, as config.rtd_head says."""
    if config.rtd_head == "dense":
        return MetroDenseTokenHead(config.hidden_size)
    return nn.Linear(config.hidden_size, 1)


MAIN_HEADS: dict[str, Callable[[MetroConfig], nn.Module]] = {
    "rtd": detection_head,
    "clm": main_lm_head,
    "cloze": main_lm_head,
    "mlm": main_lm_head,
}
"""What stands behind main as `{objective}_head`, by objective. Of sequence contrast ("scl") none is kept: its head is a
projection that serves the contrastive loss alone, and what tasks read is the state of <s>."""
LANGUAGE_MODELS = ("clm", "mlm")
"""Objectives that give logits of the original tokens; a run has at most one of them."""


def require(config: MetroConfig, *objectives: str) -> str:
    """The one of objectives that main was pretrained with. Raises ValueError if it is none of them."""
    for objective in objectives:
        if objective in config.objectives:
            return objective
    raise ValueError(
        f"this model was pretrained with {', '.join(config.objectives)} and has no head of "
        f"{' or '.join(objectives)}; MetroForPreTraining loads the heads that it has"
    )


def require_auxiliary(config: MetroConfig) -> None:
    """Raise ValueError where there is no auxiliary model."""
    if not config.num_auxiliary_layers:
        raise ValueError(
            "this model has no auxiliary encoder (num_auxiliary_layers is 0); MetroModel loads what it has"
        )


def token_cross_entropy(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Mean over labelled positions; logits [B, S, C], labels [B, S] with IGNORED elsewhere."""
    if labels is None:
        return None
    return functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


def tied_weights(shared_embeddings: str, shared_lm_bias: bool, heads: Collection[str]) -> dict[str, str]:
    """Parameters that are others: decoders of the heads, and what the auxiliary, if it is among them, shares."""
    shared = SHARED_EMBEDDINGS[shared_embeddings]
    owners = {head: "auxiliary" if head == "auxiliary" and not shared else "metro" for head in heads if head != "rtd"}
    tied = {
        f"{head}_head.decoder.weight": f"{owner}.embeddings.word_embeddings.weight" for head, owner in owners.items()
    }
    if "auxiliary" not in heads:
        return tied
    for part in shared[1:]:
        for kind in ("weight", "bias") if part == "norm" else ("weight",):
            tied[f"auxiliary.embeddings.{part}.{kind}"] = f"metro.embeddings.{part}.{kind}"
    if shared_lm_bias:
        tied["auxiliary_head.decoder.bias"] = "clm_head.decoder.bias"
    return tied


class MetroForMaskedLM(MetroPreTrainedModel):
    """The main encoder with its language modeling head: the original token at every position.

    Of METRO's pair it was pretrained on text in which plausible tokens stand where the auxiliary model guessed wrong,
    not on <mask>: give it text to correct, and `MetroForAuxiliaryMaskedLM` fills <mask>. A main encoder pretrained with
    "mlm" fills <mask> itself. Raises ValueError if main learned neither "clm" nor "mlm".
    """

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        objective = require(config, *LANGUAGE_MODELS)
        self.head_name = f"{objective}_head"
        self.add_module(self.head_name, MAIN_HEADS[objective](config))
        self._tied_weights_keys = tied_weights(config.shared_embeddings, False, [objective])
        self.post_init()

    @property
    def head(self) -> MetroCLMHead:
        """Hidden states to logits."""
        return self.get_submodule(self.head_name)  # type: ignore[return-value]

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MaskedLMOutput:
        """Logits [B, S, V]; loss: mean over labels [B, S] other than -100."""
        outputs = self.metro(input_ids, attention_mask, inputs_embeds, output_hidden_states, output_attentions)
        logits = self.head(outputs.last_hidden_state)
        return MaskedLMOutput(
            loss=token_cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MetroForAuxiliaryMaskedLM(MetroPreTrainedModel):
    """The auxiliary encoder with its masked language modeling head: fills <mask>. Raises ValueError without one."""

    _keys_to_ignore_on_load_unexpected = [r"^metro\.", r"^(rtd|clm|cloze)_head\."]

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        require_auxiliary(config)
        self._tied_weights_keys = tied_weights(config.shared_embeddings, config.shared_lm_bias, ["auxiliary"])
        # What it shares with the main model, under the names it has in the pair's file.
        shared = SHARED_EMBEDDINGS[config.shared_embeddings]
        self.words_name = f"{'metro' if shared else 'auxiliary'}.embeddings.word_embeddings"
        if shared:
            embeddings = MetroEmbeddings(config, is_auxiliary=False)
            parts = nn.ModuleDict({part: embeddings.get_submodule(part) for part in shared})
            self.metro = nn.ModuleDict({"embeddings": parts})
        if config.shared_lm_bias:
            bias = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(config.vocab_size))})
            self.clm_head = nn.ModuleDict({"decoder": bias})
        self.auxiliary = MetroAuxiliaryEncoder(config)
        self.auxiliary_head = MetroMLMHead(config, is_auxiliary=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.words_name)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.set_submodule(self.words_name, value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.auxiliary_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.auxiliary_head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MaskedLMOutput:
        """Logits [B, S, V]; loss: mean over labels [B, S] other than -100."""
        words = self.get_input_embeddings()(input_ids)
        outputs = self.auxiliary(words, attention_mask, output_hidden_states, output_attentions)
        logits = self.auxiliary_head(outputs.last_hidden_state)
        return MaskedLMOutput(
            loss=token_cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MetroForReplacedTokenDetection(MetroPreTrainedModel):
    """The main encoder with its replaced token detection head: sigmoid(logit) is the probability of "original".

    Raises ValueError if main did not learn "rtd".
    """

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.rtd_head = MAIN_HEADS[require(config, "rtd")](config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TokenClassifierOutput:
        """Logits [B, S]; loss: mean over labels [B, S] (1 original, 0 replaced) other than -100."""
        outputs = self.metro(input_ids, attention_mask, inputs_embeds, output_hidden_states, output_attentions)
        logits = self.rtd_head(outputs.last_hidden_state).squeeze(-1)
        loss = None
        if labels is not None:
            labelled = labels != IGNORED
            targets = labels[labelled].float()
            loss = functional.binary_cross_entropy_with_logits(logits[labelled].float(), targets)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@dataclass
class MetroForPreTrainingOutput(ModelOutput):
    """mlm_logits, clm_logits, cloze_logits [B, S, V]; rtd_logits, noised_input_ids [B, S]; main's last hidden state
    [B, S, H]. None where there is no such head; mlm_logits are the auxiliary's, or main's if it learned "mlm"."""

    mlm_logits: Tensor | None = None
    rtd_logits: Tensor | None = None
    clm_logits: Tensor | None = None
    cloze_logits: Tensor | None = None
    noised_input_ids: Tensor | None = None
    last_hidden_state: Tensor | None = None


class MetroForPreTraining(MetroPreTrainedModel):
    """All that was pretrained: main, the auxiliary if there is one, what they share, the heads of the objectives."""

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.heads = [objective for objective in config.objectives if objective in MAIN_HEADS]
        everyone = [*(["auxiliary"] if config.num_auxiliary_layers else []), *self.heads]
        self._tied_weights_keys = tied_weights(config.shared_embeddings, config.shared_lm_bias, everyone)
        if config.num_auxiliary_layers:
            self.auxiliary = MetroAuxiliaryEncoder(config)
            self.auxiliary_head = MetroMLMHead(config, is_auxiliary=True)
        for objective in self.heads:
            self.add_module(f"{objective}_head", MAIN_HEADS[objective](config))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        noised_input_ids: Tensor | None = None,
    ) -> MetroForPreTrainingOutput:
        """All logits for masked input_ids [B, S] (the auxiliary's input) and noised_input_ids [B, S] (main's).

        Without noised_input_ids, every <mask> is replaced by a sample from the auxiliary model (torch's generator); if
        there is no auxiliary, main reads input_ids as they are.
        """
        logits: dict[str, Tensor] = {}
        if self.config.num_auxiliary_layers:
            logits["mlm_logits"] = self.auxiliary_head(self.encode_auxiliary(input_ids, attention_mask))
        if noised_input_ids is None and "mlm_logits" in logits:
            is_masked = input_ids == self.config.mask_token_id
            samples = logits["mlm_logits"][is_masked].detach().float().softmax(-1).multinomial(1).squeeze(-1)
            noised_input_ids = input_ids.masked_scatter(is_masked, samples)
        elif noised_input_ids is None:
            noised_input_ids = input_ids
        hidden = self.metro(noised_input_ids, attention_mask).last_hidden_state
        for objective in self.heads:
            said = self.get_submodule(f"{objective}_head")(hidden)
            logits[f"{objective}_logits"] = said.squeeze(-1) if objective == "rtd" else said
        return MetroForPreTrainingOutput(**logits, noised_input_ids=noised_input_ids, last_hidden_state=hidden)

    def encode_auxiliary(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The auxiliary encoder's hidden states [B, S, H] of masked ids [B, S]."""
        owner = self.metro if SHARED_EMBEDDINGS[self.config.shared_embeddings] else self.auxiliary
        return self.auxiliary(owner.embeddings.word_embeddings(input_ids), attention_mask).last_hidden_state


class MetroClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, linear on the hidden state of <s>."""

    def __init__(self, config: MetroConfig):
        super().__init__()
        self.dropout = nn.Dropout(task_dropout(config))
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] to logits [B, C]."""
        pooled = torch.tanh(self.dense(self.dropout(hidden[:, 0])))
        return self.out_proj(self.dropout(pooled))


def task_dropout(config: MetroConfig) -> float:
    """Dropout of fine-tuning heads."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


class MetroForSequenceClassification(MetroPreTrainedModel):
    """The main encoder with a fresh classifier, or a regressor if num_labels is 1 or problem_type says so."""

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.classifier = MetroClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Logits [B, C]; loss: cross-entropy of labels [B], mean squared error, or one binary one per label [B, C]."""
        outputs = self.metro(input_ids, attention_mask, inputs_embeds, output_hidden_states, output_attentions)
        logits = self.classifier(outputs.last_hidden_state)
        return SequenceClassifierOutput(
            loss=self._loss(logits.float(), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, logits: Tensor, labels: Tensor | None) -> Tensor | None:
        if labels is None:
            return None
        if self.config.problem_type == "regression" or self.config.num_labels == 1:
            return functional.mse_loss(logits.view(labels.shape), labels.float())
        if self.config.problem_type == "multi_label_classification":
            return functional.binary_cross_entropy_with_logits(logits, labels.float())
        return functional.cross_entropy(logits, labels)


class MetroForTokenClassification(MetroPreTrainedModel):
    """The main encoder with a fresh classifier of every token."""

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.dropout = nn.Dropout(task_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TokenClassifierOutput:
        """Logits [B, S, C]; loss: mean over labels [B, S] other than -100."""
        outputs = self.metro(input_ids, attention_mask, inputs_embeds, output_hidden_states, output_attentions)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        return TokenClassifierOutput(
            loss=token_cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MetroForMultipleChoice(MetroPreTrainedModel):
    """The main encoder with a fresh scorer: which of several texts is the right one."""

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.dropout = nn.Dropout(task_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MultipleChoiceModelOutput:
        """input_ids [B, C, S] to logits [B, C]; loss: cross-entropy over the C candidates of labels [B].

        Hidden states and attentions are those of the B C texts.
        """
        texts = [None if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask, inputs_embeds)]
        outputs = self.metro(*texts, output_hidden_states, output_attentions)
        scores = self.classifier(self.dropout(outputs.last_hidden_state[:, 0]))
        given = input_ids if inputs_embeds is None else inputs_embeds
        logits = scores.view(given.shape[:2])  # type: ignore[union-attr]
        return MultipleChoiceModelOutput(
            loss=None if labels is None else functional.cross_entropy(logits.float(), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MetroForQuestionAnswering(MetroPreTrainedModel):
    """The main encoder with two fresh heads for the first and the last token of an answer; <s> means no answer."""

    def __init__(self, config: MetroConfig):
        super().__init__(config)
        self.metro = MetroModel(config)
        self.start_head = nn.Linear(config.hidden_size, 1)
        self.end_head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        p_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Start and end logits [B, S]; loss: mean of both cross-entropies of positions [B].

        Padding, and where p_mask [B, S] is 1 (question, specials), gets the lowest finite logit; <s> never does.
        """
        outputs = self.metro(input_ids, attention_mask, inputs_embeds, output_hidden_states, output_attentions)
        hidden = outputs.last_hidden_state
        impossible = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if attention_mask is not None:
            impossible = impossible | (attention_mask == 0)
        if p_mask is not None:
            impossible = impossible | (p_mask == 1)
        impossible[:, 0] = False
        start, end = (
            head(hidden).squeeze(-1).masked_fill(impossible, torch.finfo(hidden.dtype).min)
            for head in (self.start_head, self.end_head)
        )
        loss = None
        if start_positions is not None and end_positions is not None:
            losses = [
                functional.cross_entropy(logits.float(), positions, ignore_index=IGNORED)
                for logits, positions in ((start, start_positions), (end, end_positions))
            ]
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
