"""Parameters of a run by component: how many, in which home, and which of them tensor-parallel ranks share out.

Legend: H hidden, F feed-forward, A heads, D width of the token table, V vocabulary rows (padded), P positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from metro_megatron.config.schema import Config, EncoderSizes, ModelConfig

Home = Literal["tied", "auxiliary", "first", "layers", "last", "frozen"]
"""tied, auxiliary: the shared home, whole on every pipeline rank. first, layers, last: the stage home, on the first
stage, on all, on the last one. frozen: in no home, trained by nothing."""
SHARED: tuple[Home, ...] = ("tied", "auxiliary")


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


def matrices(sizes: EncoderSizes) -> int:
    """In the 2-D weights of an encoder's layers, 4 H^2 + 2 H F each: tensor-parallel ranks share them out."""
    hidden = sizes.hidden_size
    return sizes.num_layers * (4 * hidden**2 + 2 * hidden * sizes.ffn_hidden_size)


def is_projected(sizes: EncoderSizes, model_config: ModelConfig) -> bool:
    """Whether a linear layer leads from embeddings to hidden states (ELECTRA)."""
    return sizes.hidden_size != model_config.table_width


def _all_parts(config: Config) -> Iterator[Part]:
    model_config, source = config.model, config.corruption.source
    main, vocabulary, shared = model_config.main, model_config.padded_vocab_size, model_config.shared_parts
    yield Part("token embedding", "tied", split=vocabulary * model_config.table_width)
    yield from _positions("main", "tied", main, model_config)
    yield Part("shared positions", "tied", whole=_position_table(model_config) if "position" in shared else 0)
    yield Part("shared embedding norm", "tied", whole=2 * model_config.table_width if "norm" in shared else 0)
    yield Part("shared LM bias", "tied", split=vocabulary if "decoder" in shared else 0, is_head=True)
    if source == "auxiliary":
        yield from _auxiliary_parts("auxiliary", model_config, shared)
    elif source == "frozen":
        yield from _auxiliary_parts("frozen", model_config, ())
    elif source == "main":
        yield Part("proposing head", "auxiliary", *_language_head(main, model_config, ()), is_head=True)
    yield Part("main embedding", "first", whole=_embedding(main, model_config, shared))
    yield Part("main layers", "layers", *_layers(main))
    yield Part("main last norm", "last", whole=2 * main.hidden_size if model_config.norm_first else 0)
    for name in config.objective.main:
        yield Part(f"{name} head", "last", *_head(name, model_config, shared), is_head=True)


def _auxiliary_parts(
    home: Literal["auxiliary", "frozen"], model_config: ModelConfig, shared: Collection[str]
) -> Iterator[Part]:
    sizes, name = model_config.auxiliary, "auxiliary" if home == "auxiliary" else "frozen auxiliary"
    table = model_config.padded_vocab_size * model_config.table_width
    yield Part(f"{name} token embedding", home, split=0 if "word" in shared else table)
    yield Part(f"{name} embedding", home, whole=_embedding(sizes, model_config, shared))
    yield from _positions(name, home, sizes, model_config)
    yield Part(f"{name} layers", home, *_layers(sizes))
    yield Part(f"{name} last norm", home, whole=2 * sizes.hidden_size if model_config.norm_first else 0)
    yield Part(f"{name} head", home, *_language_head(sizes, model_config, shared), is_head=True)


def _layers(sizes: EncoderSizes) -> tuple[int, int]:
    """4 H^2 + 2 H F + F + 9 H a layer, 12 H^2 + 13 H where F is 4 H; norms and last biases are whole."""
    hidden, ffn = sizes.hidden_size, sizes.ffn_hidden_size
    return matrices(sizes) + sizes.num_layers * (3 * hidden + ffn), sizes.num_layers * 6 * hidden


def _embedding(sizes: EncoderSizes, model_config: ModelConfig, shared: Collection[str]) -> int:
    """Own positions and norm [D], and the projection to H."""
    width = model_config.table_width
    positions = 0 if "position" in shared else _position_table(model_config)
    norm = 0 if "norm" in shared else 2 * width
    return positions + norm + is_projected(sizes, model_config) * (width + 1) * sizes.hidden_size


def _position_table(model_config: ModelConfig) -> int:
    """[P, D]; full TUPE adds no positions to its input."""
    return 0 if model_config.untied_positions else model_config.max_position_embeddings * model_config.table_width


def _positions(name: str, home: Home, sizes: EncoderSizes, model_config: ModelConfig) -> Iterator[Part]:
    """What attention of an encoder reads: a table [buckets, A], TUPE's positions with their two projections."""
    scheme, hidden = model_config.position_scheme, sizes.hidden_size
    yield Part(f"{name} relative positions", home, split=scheme.num_rows * sizes.num_attention_heads)
    if scheme.is_untied:
        rows = scheme.positions + scheme.resets_cls
        yield Part(f"{name} untied positions", home, split=2 * (hidden + 1) * hidden, whole=(rows + 2) * hidden)


def _language_head(
    sizes: EncoderSizes, model_config: ModelConfig, shared: Collection[str], is_dense: bool = True
) -> tuple[int, int]:
    """The bias [V] of a decoder whose table is the token embedding; before it a dense layer to D with its norm."""
    bias = 0 if "decoder" in shared else model_config.padded_vocab_size
    return bias, (sizes.hidden_size + 3) * model_config.table_width if is_dense else 0


def _head(name: str, model_config: ModelConfig, shared: Collection[str]) -> tuple[int, int]:
    """Of one of objective.main: (split, whole)."""
    hidden = model_config.hidden_size
    dense = (hidden + 1) * hidden
    if name == "rtd":
        return 0, (dense if model_config.rtd_head == "dense" else 0) + hidden + 1
    if name == "scl":
        return 0, dense + 2 * hidden
    return _language_head(model_config.main, model_config, shared, is_dense=model_config.lm_head == "dense")
