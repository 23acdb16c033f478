"""Parameters of a run by component: how many, in which home, and which of them tensor-parallel ranks share out.

Legend: H hidden, F feed-forward, A heads, E embedding width, V vocabulary rows (padded), P positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from metro_megatron.config.schema import Config, ModelConfig

Home = Literal["tied", "auxiliary", "first", "layers", "middle", "last", "frozen"]
"""tied, auxiliary: the shared home, whole on every pipeline rank. The stage home: first, middle and last are on one
stage (middle: that of the layer which proposes replacements), layers on all. frozen: in no home, trained by nothing."""
SHARED: tuple[Home, ...] = ("tied", "auxiliary")


@dataclass(frozen=True)
class Size:
    """Of one encoder."""

    hidden: int
    """H."""
    ffn: int
    """F."""
    heads: int
    """A."""
    layers: int
    embedding: int
    """E."""

    @property
    def is_projected(self) -> bool:
        """Whether a linear layer leads from embeddings to hidden states (ELECTRA)."""
        return self.embedding != self.hidden


def main_size(model_config: ModelConfig) -> Size:
    """The main encoder's."""
    hidden = model_config.hidden_size
    heads, layers = model_config.num_attention_heads, model_config.num_layers
    return Size(hidden, model_config.ffn_hidden_size, heads, layers, model_config.embedding_size or hidden)


def auxiliary_size(model_config: ModelConfig) -> Size:
    """The auxiliary encoder's: main's where nothing else is said."""
    main = main_size(model_config)
    return Size(
        model_config.auxiliary_hidden_size or main.hidden,
        model_config.auxiliary_ffn_hidden_size or main.ffn,
        model_config.auxiliary_num_attention_heads or main.heads,
        model_config.auxiliary_num_layers,
        main.embedding,
    )


@dataclass(frozen=True)
class Part:
    """The parameters of a component."""

    name: str
    home: Home
    split: int = 0
    """Those that tensor-parallel ranks share out."""
    whole: int = 0
    """Those that each of them has."""
    is_head: bool = False
    """Whether fine-tuning leaves it behind."""

    @property
    def total(self) -> int:
        """Each parameter once."""
        return self.split + self.whole

    def on_rank(self, tp: int) -> float:
        """Held by one of tp tensor-parallel ranks."""
        return self.split / tp + self.whole


def parts(config: Config) -> list[Part]:
    """Every component, from the bottom up. A frozen auxiliary is taken to be as large as model.auxiliary_* say."""
    return [part for part in _all_parts(config) if part.total]


def trained(config: Config) -> int:
    """Everything with a gradient, each parameter once."""
    return sum(part.total for part in parts(config) if part.home != "frozen")


def main_encoder(config: Config) -> int:
    """What fine-tuning takes along: main's layers and embeddings without heads (METRO Table 3, "main")."""
    return sum(part.total for part in parts(config) if part.home not in ("auxiliary", "frozen") and not part.is_head)


def auxiliary(config: Config) -> int:
    """What only the auxiliary has, head included: not what it shares with main (METRO Table 3, "auxiliary")."""
    return sum(part.total for part in parts(config) if part.home in ("auxiliary", "frozen"))


def _all_parts(config: Config) -> Iterator[Part]:
    model_config, source = config.model, config.corruption.source
    main, vocabulary = main_size(model_config), model_config.padded_vocab_size
    is_pair = source == "auxiliary"
    shares = model_config.shared_embeddings if is_pair else "none"
    yield Part("token embedding", "tied", split=vocabulary * main.embedding)
    yield from _positions("main", "tied", main, model_config)
    if shares in ("token_position", "token_position_norm"):
        yield Part("shared positions", "tied", whole=_position_table(main, model_config))
    if shares == "token_position_norm":
        yield Part("shared embedding norm", "tied", whole=2 * main.embedding)
    has_common_bias = model_config.shared_lm_bias and is_pair and "clm" in config.objective.main
    if has_common_bias:
        yield Part("shared LM bias", "tied", split=vocabulary, is_head=True)
    if is_pair:
        yield from _auxiliary_parts("auxiliary", model_config, shares, has_common_bias)
    elif source == "frozen":
        yield from _auxiliary_parts("frozen", model_config, "none", False)
    yield Part("main embedding", "first", whole=_embedding(main, model_config, shares))
    yield Part("main layers", "layers", *_layers(main))
    yield Part("main last norm", "last", whole=2 * main.hidden if model_config.norm_first else 0)
    if source == "main":
        yield Part("proposing head", "middle", *_language_head(main, vocabulary), is_head=True)
    for name in config.objective.main:
        has_bias = not (name == "clm" and has_common_bias)
        yield Part(f"{name} head", "last", *_head(name, main, model_config, has_bias), is_head=True)


def _auxiliary_parts(
    home: Literal["auxiliary", "frozen"], model_config: ModelConfig, shares: str, has_common_bias: bool
) -> Iterator[Part]:
    size, vocabulary = auxiliary_size(model_config), model_config.padded_vocab_size
    name = "auxiliary" if home == "auxiliary" else "frozen auxiliary"
    yield Part(f"{name} token embedding", home, split=vocabulary * size.embedding if shares == "none" else 0)
    yield Part(f"{name} embedding", home, whole=_embedding(size, model_config, shares))
    yield from _positions(name, home, size, model_config)
    yield Part(f"{name} layers", home, *_layers(size))
    yield Part(f"{name} last norm", home, whole=2 * size.hidden if model_config.norm_first else 0)
    yield Part(f"{name} head", home, *_language_head(size, 0 if has_common_bias else vocabulary), is_head=True)


def _layers(size: Size) -> tuple[int, int]:
    """4 H^2 + 2 H F + F + 9 H a layer, 12 H^2 + 13 H where F is 4 H; biases of row-parallel matrices and norms whole."""
    hidden, ffn = size.hidden, size.ffn
    return size.layers * (4 * hidden**2 + 3 * hidden + 2 * hidden * ffn + ffn), size.layers * 6 * hidden


def _embedding(size: Size, model_config: ModelConfig, shares: str) -> int:
    """Own positions and norm [E], and the projection to H."""
    positions = _position_table(size, model_config) if shares in ("none", "token") else 0
    norm = 2 * size.embedding if shares != "token_position_norm" else 0
    return positions + norm + (size.is_projected * (size.embedding + 1) * size.hidden)


def _position_table(size: Size, model_config: ModelConfig) -> int:
    """[P, E]; full TUPE adds no positions to its input."""
    return 0 if model_config.untied_positions else model_config.max_position_embeddings * size.embedding


def _positions(name: str, home: Home, size: Size, model_config: ModelConfig) -> Iterator[Part]:
    """What attention of an encoder reads: a table [buckets, A], TUPE's positions with their two projections."""
    scheme = model_config.position_scheme
    yield Part(f"{name} relative positions", home, split=scheme.num_rows * size.heads)
    if model_config.untied_positions:
        rows, hidden = scheme.positions + scheme.resets_cls, size.hidden
        yield Part(f"{name} untied positions", home, split=2 * (hidden + 1) * hidden, whole=(rows + 2) * hidden)


def _language_head(size: Size, bias: int, is_dense: bool = True) -> tuple[int, int]:
    """The decoder's bias [V], its table being the token embedding; before it a dense layer to E with its norm."""
    return bias, (size.hidden + 3) * size.embedding if is_dense else 0


def _head(name: str, size: Size, model_config: ModelConfig, has_bias: bool) -> tuple[int, int]:
    """Of one of objective.main; (split, whole)."""
    dense = (size.hidden + 1) * size.hidden
    if name == "rtd":
        return 0, (dense if model_config.rtd_head == "dense" else 0) + size.hidden + 1
    if name == "scl":
        return 0, dense + 2 * size.hidden
    bias = model_config.padded_vocab_size if has_bias else 0
    return _language_head(size, bias, is_dense=model_config.lm_head == "dense")
