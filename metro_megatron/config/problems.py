"""Every mistake that a configuration and the number of processes show before anything is built."""

from collections.abc import Iterator
from typing import Literal

from fused.attention import HEAD_DIMS, MOST_POSITIONS
from fused.layer_norm import WIDEST
from metro_megatron.cli.options import Range, flatten, options_of, out_of_range
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.schedule import Schedule


def problems(config: Config, world_size: int, device: Literal["cpu", "cuda"] | None = None) -> list[str]:
    """What is wrong with `config` on `world_size` processes; each entry says value, limit and remedy.

    `device` is what `train.device` "auto" turned out to be, where that is known. Numbers outside their
    ranges hide the checks that would calculate with them. Evaluation without validation data is no mistake:
    it is skipped.
    """
    found = out_of_range({option.name: option for option in options_of(Config)}, flatten(config))
    if not found:
        found += _model(config)
        found += _early_exit(config)
        found += _layout(config, world_size)
        found += _rows(config)
        found += _batch(config, world_size)
        found += _schedule(config)
        found += _precision(config, device or config.train.device)
        found += _kernels(config, device or config.train.device)
    return found + list(_paths(config))


def _model(config: Config) -> Iterator[str]:
    model = config.model
    heads = model.num_attention_heads
    yield from _divides("model.num_attention_heads", heads, "model.hidden_size", model.hidden_size)
    yield from model.position_scheme.problems()


def _early_exit(config: Config) -> Iterator[str]:
    layers, depth, parallel = config.early_exit.layers, config.model.num_layers, config.parallel
    if not layers:
        return
    for layer in layers:
        if not 0 < layer < depth:
            yield (
                f"early_exit.layers has {layer}, must be at least 1 and less than model.num_layers {depth}, behind "
                "which all tokens end; leave it out"
            )
    if sorted(set(layers)) != layers:
        ascending = " ".join(map(str, sorted(set(layers))))
        yield f"early_exit.layers is {' '.join(map(str, layers))}, must ascend, each once: {ascending}"
    if "rtd" not in config.objective.main:
        yield (
            f"early_exit.layers is given and objective.main is {' '.join(config.objective.main)}; exits ask "
            "the head of replaced token detection: add rtd, or leave early_exit.layers empty"
        )
    try:
        schedule = Schedule.parse(config.early_exit.share)
    except UserError as error:
        yield f"early_exit.share: {error}"
    else:
        yield from schedule.problems("early_exit.share", config.train.train_steps, Range(0, 1))
    if parallel.pipeline_model_parallel_size > 1:
        yield (
            f"parallel.pipeline_model_parallel_size is {parallel.pipeline_model_parallel_size}, with early_exit.layers "
            "it must be 1: which tokens have left is not sent from stage to stage; use "
            "parallel.tensor_model_parallel_size, or leave early_exit.layers empty"
        )
    if parallel.sequence_parallel:
        yield (
            "parallel.sequence_parallel is true, with early_exit.layers it must be false: the tokens that stay are "
            "gathered from all positions, and no rank has them all; set it false, or leave early_exit.layers empty"
        )


def _layout(config: Config, world_size: int) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    tensor = "parallel.tensor_model_parallel_size"
    yield from _divides(tensor, tp, "model.num_attention_heads", model.num_attention_heads)
    yield from _divides(tensor, tp, "model.ffn_hidden_size", model.ffn_hidden_size)
    yield from _divides(tensor, tp, "model.vocab_size rounded up to a multiple of 128,", model.padded_vocab_size)
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
    if world_size % parallel.model_ranks:
        yield (
            f"{world_size} processes, must be a multiple of {parallel.model_ranks}: "
            f"parallel.tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}; "
            f"start {_nearest_multiple(world_size, parallel.model_ranks)}, or use smaller sizes"
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
    if data.row_length < data.seq_length:
        yield (
            f"data.micro_batch_tokens is {data.micro_batch_tokens}, but a row must hold one sample of "
            f"data.seq_length {data.seq_length}; raise the first to a multiple of it"
        )
    name, length = "micro_batch_tokens" if data.is_packed else "seq_length", data.row_length
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and length % tp:
        yield (
            f"data.{name} is {length}, with parallel.sequence_parallel it must be a multiple of "
            f"parallel.tensor_model_parallel_size {tp}; use {_nearest_multiple(length, tp)}"
        )


def _batch(config: Config, world_size: int) -> Iterator[str]:
    data, batch, model_ranks = config.data, config.train.global_batch_size, config.parallel.model_ranks
    if world_size % model_ranks:
        return
    dp = world_size // model_ranks
    if batch == 0:
        yield from _token_batch(config, dp)
    elif not data.is_packed and batch % (data.micro_batch_size * dp):
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
    data, tokens, multiple = config.data, config.train.global_batch_tokens, config.parallel.micro_batch_multiple
    name = "data.micro_batch_tokens" if data.is_packed else "data.micro_batch_size x seq_length"
    chunk = data.micro_batch_slots * dp * multiple
    if tokens % chunk:
        yield (
            f"train.global_batch_tokens is {tokens}, must be divisible by {chunk} = {name} {data.micro_batch_slots} x "
            f"{dp} data-parallel ranks{f' x {multiple} pipeline stages' if multiple > 1 else ''}; use "
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
    remedy = "set train.fused to reference, which is slower"
    if model.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        yield (
            f"model.hidden_size / model.num_attention_heads is {model.head_dim}, the attention kernels have {sizes}; "
            f"change model.num_attention_heads, or {remedy}"
        )
    if model.hidden_size > WIDEST:
        yield f"model.hidden_size is {model.hidden_size}, the LayerNorm kernels take at most {WIDEST}; {remedy}"
    if seq_length > MOST_POSITIONS:
        yield f"data.seq_length is {seq_length}, the attention kernels take at most {MOST_POSITIONS}; {remedy}"


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
