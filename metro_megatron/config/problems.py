"""Every mistake that a configuration and the number of processes show before anything is built."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fused.attention.dropout import LONGEST
from fused.attention.launches import HEAD_DIMS
from fused.layer_norm.operator import WIDEST
from metro_megatron.config.file import flatten
from metro_megatron.config.schema import Config
from metro_megatron.vocabulary import padded_vocab_size


@dataclass(frozen=True)
class Range:
    """Admitted numbers; the upper end never belongs to it."""

    low: float
    high: float = math.inf
    has_low: bool = True

    def __contains__(self, value: float) -> bool:
        return value < self.high and (value >= self.low if self.has_low else value > self.low)

    def __str__(self) -> str:
        at_least = f"at least {self.low:g}" if self.has_low else f"greater than {self.low:g}"
        return at_least if self.high == math.inf else f"{at_least} and less than {self.high:g}"


_NOT_NEGATIVE = Range(0)
_ONE_OR_MORE = Range(1)
_POSITIVE = Range(0, has_low=False)
_BELOW_ONE = Range(0, 1)

RANGES = {
    "model.hidden_size": _ONE_OR_MORE,
    "model.num_attention_heads": _ONE_OR_MORE,
    "model.ffn_hidden_size": _ONE_OR_MORE,
    "model.num_layers": _ONE_OR_MORE,
    "model.auxiliary_num_layers": _ONE_OR_MORE,
    "model.vocab_size": Range(6),
    "model.max_position_embeddings": Range(3),
    "model.relative_attention_num_buckets": Range(4),
    "model.relative_attention_max_distance": _ONE_OR_MORE,
    "model.layer_norm_eps": _POSITIVE,
    "model.hidden_dropout": _BELOW_ONE,
    "model.attention_dropout": _BELOW_ONE,
    "model.init_method_std": _POSITIVE,
    "objective.mask_probability": Range(0, 1, has_low=False),
    "objective.rtd_weight": _NOT_NEGATIVE,
    "objective.clm_weight": _NOT_NEGATIVE,
    "data.validation_fraction": _BELOW_ONE,
    "data.seq_length": Range(3),
    "data.micro_batch_tokens": _ONE_OR_MORE,
    "data.micro_batch_size": _ONE_OR_MORE,
    "data.prefetch_steps": _NOT_NEGATIVE,
    "optimizer.lr": _POSITIVE,
    "optimizer.lr_warmup_steps": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.adam_beta1": _BELOW_ONE,
    "optimizer.adam_beta2": _BELOW_ONE,
    "optimizer.adam_eps": _POSITIVE,
    "optimizer.clip_grad": _NOT_NEGATIVE,
    "optimizer.initial_loss_scale": _POSITIVE,
    "optimizer.min_loss_scale": _POSITIVE,
    "optimizer.loss_scale_window": _ONE_OR_MORE,
    "optimizer.hysteresis": _ONE_OR_MORE,
    "parallel.tensor_model_parallel_size": _ONE_OR_MORE,
    "parallel.pipeline_model_parallel_size": _ONE_OR_MORE,
    "parallel.virtual_pipeline_model_parallel_size": _ONE_OR_MORE,
    "parallel.timeout_minutes": _ONE_OR_MORE,
    "checkpoint.save_interval": _ONE_OR_MORE,
    "checkpoint.keep_last": _NOT_NEGATIVE,
    "train.train_steps": _ONE_OR_MORE,
    "train.global_batch_tokens": _ONE_OR_MORE,
    "train.global_batch_size": _NOT_NEGATIVE,
    "train.seed": Range(0, 2**63),
    "train.log_interval": _ONE_OR_MORE,
    "train.eval_interval": _NOT_NEGATIVE,
    "train.eval_samples": _ONE_OR_MORE,
}
"""Admitted values of every number in the configuration; a test holds it complete."""


def problems(config: Config, world_size: int, device: Literal["cpu", "cuda"] | None = None) -> list[str]:
    """What is wrong with `config` on `world_size` processes; each entry says value, limit and remedy.

    `device` is what `train.device` "auto" turned out to be, where that is known. Numbers outside their
    ranges hide the checks that would calculate with them. Evaluation without validation data is no mistake:
    it is skipped.
    """
    found = list(_out_of_range(config))
    if not found:
        found += _model(config)
        found += _layout(config, world_size)
        found += _rows(config)
        found += _batch(config, world_size)
        found += _schedule(config)
        found += _precision(config, device or config.train.device)
        found += _kernels(config, device or config.train.device)
    return found + list(_paths(config))


def _out_of_range(config: Config) -> Iterator[str]:
    for name, value in flatten(config).items():
        if name in RANGES and value not in RANGES[name]:
            yield f"{name} is {value}, must be {RANGES[name]}"


def _model(config: Config) -> Iterator[str]:
    model = config.model
    heads = model.num_attention_heads
    yield from _divides("model.num_attention_heads", heads, "model.hidden_size", model.hidden_size)
    yield from model.position_scheme.problems()


def _layout(config: Config, world_size: int) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    tensor = "parallel.tensor_model_parallel_size"
    yield from _divides(tensor, tp, "model.num_attention_heads", model.num_attention_heads)
    yield from _divides(tensor, tp, "model.ffn_hidden_size", model.ffn_hidden_size)
    padded = padded_vocab_size(model.vocab_size)
    yield from _divides(tensor, tp, "model.vocab_size rounded up to a multiple of 128,", padded)
    if vpp > 1 and pp == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size is {vpp}, but there is one pipeline stage; "
            "use 1, or a parallel.pipeline_model_parallel_size of 2 or more"
        )
    elif model.num_layers % (pp * vpp):
        yield (
            f"model.num_layers is {model.num_layers}, must be divisible by the {pp * vpp} chunks of "
            f"parallel.pipeline_model_parallel_size {pp} x virtual_pipeline_model_parallel_size {vpp}; "
            f"a product of {_choices(model.num_layers)} fits"
        )
    if world_size % (tp * pp):
        yield (
            f"{world_size} processes, must be a multiple of {tp * pp}: "
            f"parallel.tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}; "
            f"start {_nearest_multiple(world_size, tp * pp)}, "
            "or use smaller sizes"
        )
    if parallel.sequence_parallel and tp == 1:
        yield (
            "parallel.sequence_parallel needs a parallel.tensor_model_parallel_size of 2 or more, it is 1; "
            "set parallel.sequence_parallel false"
        )


def _rows(config: Config) -> Iterator[str]:
    data, parallel = config.data, config.parallel
    positions = config.model.max_position_embeddings
    if data.seq_length > positions:
        yield (
            f"data.seq_length is {data.seq_length}, model.max_position_embeddings only {positions}; "
            "lower the first or raise the second"
        )
    is_packed = data.row_format == "packed"
    if is_packed and data.micro_batch_tokens < data.seq_length:
        yield (
            f"data.micro_batch_tokens is {data.micro_batch_tokens}, but a row must hold one sample of "
            f"data.seq_length {data.seq_length}; raise the first to a multiple of it"
        )
    name = "micro_batch_tokens" if is_packed else "seq_length"
    length = getattr(data, name)
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and length % tp:
        yield (
            f"data.{name} is {length}, with parallel.sequence_parallel it must be a multiple of "
            f"parallel.tensor_model_parallel_size {tp}; use {_nearest_multiple(length, tp)}"
        )


def _batch(config: Config, world_size: int) -> Iterator[str]:
    parallel, data, batch = config.parallel, config.data, config.train.global_batch_size
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % model_ranks:
        return
    dp = world_size // model_ranks
    if batch == 0:
        yield from _token_batch(config, dp)
    elif data.row_format == "padded" and batch % (data.micro_batch_size * dp):
        chunk = data.micro_batch_size * dp
        yield (
            f"train.global_batch_size is {batch}, must be divisible by {chunk} = data.micro_batch_size "
            f"{data.micro_batch_size} x {dp} data-parallel ranks; use {_nearest_multiple(batch, chunk)}, "
            "another micro_batch_size, or data.row_format packed"
        )
    elif batch < dp:
        yield (
            f"train.global_batch_size is {batch}, less than one sample for each of {dp} data-parallel ranks; "
            f"use {dp} or more, or start fewer processes"
        )


def _token_batch(config: Config, dp: int) -> Iterator[str]:
    parallel, data, tokens = config.parallel, config.data, config.train.global_batch_tokens
    is_packed = data.row_format == "packed"
    micro_batch = data.micro_batch_tokens if is_packed else data.micro_batch_size * data.seq_length
    name = "data.micro_batch_tokens" if is_packed else "data.micro_batch_size x seq_length"
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    stages = parallel.pipeline_model_parallel_size if interleaved else 1
    chunk = micro_batch * dp * stages
    if tokens % chunk:
        yield (
            f"train.global_batch_tokens is {tokens}, must be divisible by {chunk} = {name} {micro_batch} x {dp} "
            f"data-parallel ranks{f' x {stages} pipeline stages' if interleaved else ''}; use "
            f"{_nearest_multiple(tokens, chunk)}, or give train.global_batch_size in samples"
        )


def _schedule(config: Config) -> Iterator[str]:
    optimizer, steps = config.optimizer, config.train.train_steps
    if optimizer.lr_warmup_steps > steps:
        yield (
            f"optimizer.lr_warmup_steps is {optimizer.lr_warmup_steps}, more than train.train_steps {steps}; "
            "lower the first (6 to 8% of the steps is usual) or raise the second"
        )
    if optimizer.initial_loss_scale < optimizer.min_loss_scale:
        yield (
            f"optimizer.initial_loss_scale is {optimizer.initial_loss_scale:g}, less than "
            f"optimizer.min_loss_scale {optimizer.min_loss_scale:g}; swap them"
        )


def _precision(config: Config, device: str) -> Iterator[str]:
    if config.train.precision == "fp16" and device == "cpu":
        # Half-precision matrix products on processors are some twenty times slower than fp32.
        yield "train.precision is fp16, which needs a GPU; on the cpu use fp32 or bf16"


def _kernels(config: Config, device: str) -> Iterator[str]:
    model, seq_length = config.model, config.data.seq_length
    if device != "cuda" or config.train.fused == "reference":
        return
    head_dim = model.hidden_size // model.num_attention_heads
    remedy = "set train.fused to reference, which is slower"
    if head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        yield (
            f"model.hidden_size / model.num_attention_heads is {head_dim}, the attention kernels have {sizes}; "
            f"change model.num_attention_heads, or {remedy}"
        )
    if model.hidden_size > WIDEST:
        yield f"model.hidden_size is {model.hidden_size}, the LayerNorm kernels take at most {WIDEST}; {remedy}"
    if seq_length > LONGEST:
        yield f"data.seq_length is {seq_length}, the attention kernels take at most {LONGEST}; {remedy}"


def _paths(config: Config) -> Iterator[str]:
    data = config.data
    if not data.train:
        yield "data.train is empty; give what tools/preprocess_data.py wrote: --data.train PREFIX..."
    if not config.train.output:
        yield "train.output is empty; name the run's folder: --train.output DIR"
    if data.validation and data.validation_fraction > 0:
        yield (
            f"data.validation is given and data.validation_fraction is {data.validation_fraction:g}; "
            "use one of the two: validation shards, or a fraction of the training documents"
        )


def _divides(name: str, divisor: int, of: str, value: int) -> Iterator[str]:
    if value % divisor:
        yield f"{name} is {divisor}, must divide {of} {value}: {_choices(value)}"


def _choices(value: int) -> str:
    """The divisors of `value` that someone would use, written as alternatives."""
    divisors = [str(divisor) for divisor in range(1, min(value, 128) + 1) if value % divisor == 0]
    return " or ".join([", ".join(divisors[:-1]), divisors[-1]] if len(divisors) > 1 else divisors)


def _nearest_multiple(value: int, of: int) -> int:
    return max(1, round(value / of)) * of
