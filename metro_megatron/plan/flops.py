"""Floating point operations of a run's matrix products, in two accountings.

`works` lists them by component. Of each, forward is counted once; training a component is 3 times that, and what
backward computes again (layers with parallel.recompute full, vocabulary logits always) comes on top. Model FLOPs leave
that out: MFU and "total teraFLOPs" at a factor of 3 are made of them.

Nothing is halved for a causal mask, heads work on masked tokens only, and padding costs nothing: tokens are real ones.
Elementwise operations, norms and softmax are left out, as is usual.

Legend: H hidden, F feed-forward, D width of the token table, V vocabulary rows (padded), L length of a sample, R rows
of hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from metro_megatron.config.early_exit import LEVELS, Exits
from metro_megatron.config.schema import Config, EncoderSizes, ModelConfig
from metro_megatron.plan.parameters import is_projected

Where = Literal["corruption", "layers", "heads"]
"""Phase 1 of a step, main's layers on all stages, main's heads on the last one."""


@dataclass(frozen=True)
class Amount:
    """What is processed."""

    tokens: float = 0.0
    """Real ones."""
    squares: float = 0.0
    """Sum of L^2 over the samples, for attention."""
    samples: float = 0.0
    micro_batches: float = 0.0

    @classmethod
    def of_samples(cls, samples: float, length: float) -> Amount:
        """Samples of one length, in no micro batches."""
        return cls(samples * length, samples * length**2, samples)

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(sum(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> Amount:
        return Amount(*(factor * value for value in vars(self).values()))


@dataclass(frozen=True)
class Work:
    """Forward FLOPs of one component, and how often they are done."""

    name: str
    where: Where
    token: float = 0.0
    """For every real token."""
    square: float = 0.0
    """For every L^2."""
    sample: float = 0.0
    micro_batch: float = 0.0
    passes: int = 3
    """Forward, and twice as much for backward; 1: forward only."""
    again: int = 0
    """Forward passes that backward repeats."""

    def forward(self, amount: Amount) -> float:
        return (
            self.token * amount.tokens
            + self.square * amount.squares
            + self.sample * amount.samples
            + self.micro_batch * amount.micro_batches
        )


def works(config: Config) -> list[Work]:
    """All components in the order of a step; where tokens leave early, of the run on average."""
    return [*_corruption_works(config), *_main_works(config)]


def model_flops(config: Config, amount: Amount) -> float:
    """What the model asks for: no recomputation. The numerator of MFU."""
    return sum(work.passes * work.forward(amount) for work in works(config))


def step_flops(config: Config, step: int, amount: Amount) -> float:
    """model_flops of a step of a run, counted from 0, with its phase and its share of early exits."""
    held = config.early_exit.held(step, config.train.train_steps)
    return model_flops(replace(config.by_phase[config.phase_at(step)], early_exit=held), amount)


def achieved_tflops(flops: float, seconds: float, processes: int) -> float:
    """TFLOP/s of each of the processes that did model FLOPs in so many seconds; MFU is its share of a peak."""
    return flops / seconds / processes / 1e12


def done_flops(config: Config, amount: Amount, *where: Where) -> float:
    """What is really multiplied under this configuration, everywhere or where it is said."""
    return sum(
        (work.passes + work.again) * work.forward(amount) for work in works(config) if not where or work.where in where
    )


def narayanan_flops(config: Config, tokens: float) -> float:
    """Megatron's formula 96 B s l h^2 (1 + s/6h + V/16lh) for each encoder, tokens = B s: "following Smith et al.".

    It has all layers recomputed (4 passes), a head over the whole vocabulary on every token and F = 4 H. An auxiliary
    of other passes is counted in proportion, one that is not run not at all.
    """
    length, model_config = config.data.seq_length, config.model
    total = 0.0
    for sizes, passes in ((model_config.main, 3), (proposer(config), proposer_passes(config))):
        layers, hidden = sizes.num_layers, sizes.hidden_size
        shares = 1 + length / (6 * hidden) + model_config.padded_vocab_size / (16 * layers * hidden)
        recomputed = passes + (passes >= 3)
        total += recomputed / 4 * 96 * tokens * layers * hidden**2 * shares
    return total


def layer_flops(hidden: int, inner: int, rows: float, updated: float, squares: float) -> float:
    """Forward FLOPs of a layer that updates some of its R rows.

    A row that is updated takes 8 H^2 + 4 H F; one that has left early 4 H^2, its keys and values; attention, scores and
    their mix, 4 H times squares, the sum of L^2 over the samples, whoever has left.
    """
    return updated * (8 * hidden**2 + 4 * hidden * inner) + (rows - updated) * 4 * hidden**2 + 4 * hidden * squares


def main_flops(model_config: ModelConfig, exits: Exits | None, rows: int, squares: float) -> float:
    """Forward FLOPs of all main layers and of detection at the exits; no exits: full depth."""
    hidden, inner, layers = (
        model_config.hidden_size,
        model_config.ffn_hidden_size,
        range(1, model_config.num_layers + 1),
    )
    if exits is None:
        return len(layers) * layer_flops(hidden, inner, rows, rows, squares)
    heads = len(exits.layers) * rows * _detection_flops(model_config)
    return heads + sum(layer_flops(hidden, inner, rows, exits.updated(rows, layer), squares) for layer in layers)


def proposer(config: Config) -> EncoderSizes:
    """The encoder that fills masks: the auxiliary, or main up to the layer whose head proposes."""
    if config.corruption.source == "main":
        return replace(config.model.main, num_layers=config.proposing_layers)
    return config.model.auxiliary


def proposer_passes(config: Config) -> int:
    """3 where it learns, 4 where samples come from a pass of their own, 1 where it is frozen, 0 without one."""
    if config.corruption.source in ("auxiliary", "main"):
        return 4 if config.model.auxiliary_dropout == "eval" else 3
    return 1 if config.corruption.source == "frozen" else 0


def _corruption_works(config: Config) -> Iterator[Work]:
    source, passes, sizes = config.corruption.source, proposer_passes(config), proposer(config)
    if passes:
        name = "proposing" if source == "main" else "auxiliary"
        # Main's layers are not recomputed when they propose.
        repeats = _layer_repeats(config) if source == "auxiliary" else 0
        yield _encoder_work(f"{name} layers", "corruption", sizes, config.model, passes, repeats)
        if passes >= 3:
            yield from _modules_again(name, "corruption", sizes, config)
        yield _position_work(f"{name} positions", "corruption", sizes, config.model, passes)
        masked = config.objective.mask_probability
        yield from _language_works(name, "corruption", sizes, config.model, masked, passes)


def _main_works(config: Config) -> Iterator[Work]:
    model_config, objective, sizes = config.model, config.objective, config.model.main
    crop = objective.scl_crop if "scl" in objective.main else 0.0
    layers = _encoder_work("main layers", "layers", sizes, model_config, 3, _layer_repeats(config))
    if exits := config.early_exit.average_exits(config.train.train_steps):
        # Of LEVELS rows all shares are whole numbers.
        full, shallow = (main_flops(model_config, one, LEVELS, 0.0) for one in (None, exits))
        layers = replace(layers, token=layers.token - (full - shallow) / LEVELS)
    yield layers
    yield from _modules_again("main", "layers", sizes, config)
    yield _position_work("main positions", "layers", sizes, model_config, 3)
    if crop:
        # The cropped view is read beside the first: crop of its tokens, crop^2 of its scores.
        token, square = crop * layers.token, crop**2 * layers.square
        yield Work("main layers, cropped view", "layers", token, square, again=layers.again)
        yield from _modules_again("cropped view", "layers", sizes, config, crop)
    for name in objective.main:
        if name == "rtd":
            yield Work("rtd head", "heads", _detection_flops(model_config) * (1 + crop))
        elif name == "scl":
            yield Work("scl head", "heads", sample=2 * 2 * sizes.hidden_size**2)
        elif name == "cloze":
            yield from _cloze_works(sizes, model_config, objective.mask_probability)
        else:
            is_dense = model_config.lm_head == "dense"
            yield from _language_works(name, "heads", sizes, model_config, objective.mask_probability, 3, is_dense)


def _layer_repeats(config: Config) -> int:
    return int(config.parallel.recompute == "full")


def _modules_again(name: str, where: Where, sizes: EncoderSizes, config: Config, share: float = 1.0) -> Iterator[Work]:
    """What parallel.recompute_modules multiply again for a share of the tokens.

    mlp: 2 H F a token, its first matrix; core_attn: scores and mix; layernorm and mlp_act multiply nothing.
    """
    modules = config.parallel.recompute_modules if config.parallel.recompute == "selective" else []
    hidden, inner, layers = sizes.hidden_size, sizes.ffn_hidden_size, sizes.num_layers
    token = 2 * hidden * inner * layers * share * ("mlp" in modules)
    square = 4 * hidden * layers * share**2 * ("core_attn" in modules)
    if token or square:
        yield Work(f"{name} layers, modules again", where, token, square, passes=0, again=1)


def _encoder_work(
    name: str, where: Where, sizes: EncoderSizes, model_config: ModelConfig, passes: int, repeats: int
) -> Work:
    """All layers, and 2 D H a token where the embedding is projected."""
    hidden, inner, layers = sizes.hidden_size, sizes.ffn_hidden_size, sizes.num_layers
    projection = 2 * model_config.table_width * hidden if is_projected(sizes, model_config) else 0
    return Work(
        name,
        where,
        token=layers * layer_flops(hidden, inner, rows=1, updated=1, squares=0) + projection,
        square=layers * layer_flops(hidden, inner, rows=0, updated=0, squares=1),
        passes=passes,
        again=repeats,
    )


def _detection_flops(model_config: ModelConfig) -> float:
    """2 H a token, and 2 H^2 for the dense layer."""
    hidden = model_config.hidden_size
    return 2 * hidden + (2 * hidden**2 if model_config.rtd_head == "dense" else 0)


def _position_work(name: str, where: Where, sizes: EncoderSizes, model_config: ModelConfig, passes: int) -> Work:
    """Once a micro batch for all layers: distances to buckets as a one-hot matrix product, and TUPE's untied term."""
    scheme = model_config.position_scheme
    distances = 2 * scheme.reach + 1 + 2 * scheme.resets_cls if scheme.num_rows else 0
    table = 2 * distances * scheme.num_rows * sizes.num_attention_heads
    rows = scheme.positions + scheme.resets_cls
    untied = 4 * rows * sizes.hidden_size**2 + 2 * rows**2 * sizes.hidden_size if model_config.untied_positions else 0
    return Work(name, where, micro_batch=table + untied, passes=passes)


def _language_works(
    name: str,
    where: Where,
    sizes: EncoderSizes,
    model_config: ModelConfig,
    masked: float,
    passes: int,
    is_dense: bool = True,
) -> Iterator[Work]:
    """2 H D for the dense layer and 2 D V for the decoder of every masked token; backward makes the logits again."""
    dense = 2 * sizes.hidden_size * model_config.table_width if is_dense else 0
    decoder = 2 * model_config.table_width * model_config.padded_vocab_size
    if dense:
        yield Work(f"{name} head, dense", where, masked * dense, passes=passes)
    yield Work(f"{name} head, decoder", where, masked * decoder, passes=passes, again=int(passes > 1))


def _cloze_works(sizes: EncoderSizes, model_config: ModelConfig, masked: float) -> Iterator[Work]:
    """Three candidates a masked token, 2 D each, of which the auxiliary draws two from a pass over all ids."""
    yield Work(
        "cloze candidates",
        "corruption",
        masked * 2 * model_config.table_width * model_config.padded_vocab_size,
        passes=1,
    )
    dense = 2 * sizes.hidden_size * model_config.table_width if model_config.lm_head == "dense" else 0
    yield Work("cloze head", "heads", masked * (dense + 3 * 2 * model_config.table_width))
