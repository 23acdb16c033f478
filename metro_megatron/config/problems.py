"""Every mistake that a configuration and the number of processes show before anything is built."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from fused.attention import HEAD_DIMS, MOST_POSITIONS
from fused.layer_norm import WIDEST
from metro_megatron.cli.options import Range, flatten, options_of, out_of_range
from metro_megatron.config.implementations import implementation_problems
from metro_megatron.config.phases import Phase
from metro_megatron.config.rows import FULL_ROW_SAMPLES, RowRule
from metro_megatron.config.schema import (
    OVERRIDE_MAY_CHANGE,
    Config,
    EncoderSizes,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from metro_megatron.config.stages import layers_of_layout
from metro_megatron.config.variants import variant_problems
from metro_megatron.errors import UserError
from metro_megatron.schedule import step_window, steps_of


def problems(config: Config, world_size: int, device: Literal["cpu", "cuda"] | None = None) -> list[str]:
    """What is wrong with `config` on `world_size` processes; each entry says value, limit and remedy.

    `device` is what `train.device` "auto" turned out to be, where that is known. Numbers outside their
    ranges hide the checks that would calculate with them. Evaluation without validation data is no mistake:
    it is skipped.
    """
    return setting_problems(config, world_size, device) + list(_paths(config))


def setting_problems(config: Config, world_size: int, device: Literal["cpu", "cuda"] | None = None) -> list[str]:
    """Those of `problems` that do not wait for paths to be given."""
    found = _out_of_range(config)
    if not found:
        found += _model(config)
        found += variant_problems(config)
        found += _layout(config, world_size)
        found += row_problems(config)
        found += _batch(config, world_size)
        found += _schedule(config)
        found += _steering(config)
        found += _optimizers(config)
        found += _precision(config, device or config.train.device)
        found += _kernels(config, device or config.train.device)
        found += implementation_problems(config, device or config.train.device)
        found += _phases(config, world_size, device or config.train.device)
        found += _initial_weights(config)
    return found


def _out_of_range(config: Config) -> list[str]:
    return out_of_range({option.name: option for option in options_of(Config)}, flatten(config))


def _model(config: Config) -> Iterator[str]:
    model = config.model
    for prefix, sizes in _encoders(model):
        heads, width = sizes.num_attention_heads, sizes.hidden_size
        yield from _divides(f"{prefix}num_attention_heads", heads, f"{prefix}hidden_size", width)
    yield from model.position_scheme.problems()


def _encoders(model: ModelConfig) -> Iterator[tuple[str, EncoderSizes]]:
    """With what the options of an encoder begin, and its sizes; the auxiliary's where they are not main's."""
    yield "model.", model.main
    if replace(model.auxiliary, num_layers=model.num_layers) != model.main:
        yield "model.auxiliary_", model.auxiliary


def _layout(config: Config, world_size: int) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    tensor = "parallel.tensor_model_parallel_size"
    for prefix, sizes in _encoders(model):
        yield from _divides(tensor, tp, f"{prefix}num_attention_heads", sizes.num_attention_heads)
        yield from _divides(tensor, tp, f"{prefix}ffn_hidden_size", sizes.ffn_hidden_size)
    yield from _divides(tensor, tp, "model.vocab_size rounded up to a multiple of 128,", model.padded_vocab_size)
    if vpp > 1 and pp == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size is {vpp}, but there is one pipeline stage; "
            "use 1, or a parallel.pipeline_model_parallel_size of 2 or more"
        )
    else:
        yield from _stages(config)
    yield from _recompute(config)
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


def _stages(config: Config) -> Iterator[str]:
    depth, parallel = config.model.num_layers, config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    chunks = (
        f"{pp * vpp} chunks of parallel.pipeline_model_parallel_size {pp} x virtual_pipeline_model_parallel_size {vpp}"
    )
    if depth < pp * vpp:
        yield f"model.num_layers is {depth}, less than one layer for each of {chunks}; use fewer of these"
    if parallel.pipeline_model_parallel_layout:
        name = "parallel.pipeline_model_parallel_layout"
        try:
            layers = layers_of_layout(parallel.pipeline_model_parallel_layout)
        except UserError as error:
            yield f"{name}: {error}"
            return
        if len(layers) != pp * vpp:
            yield f"{name} has {len(layers)} chunks, but there are {chunks}; write as many, or leave it out"
        if sum(layers) != depth:
            yield (
                f"{name} has {sum(layers)} layers, but model.num_layers is {depth}; write as many t, or leave it out"
            )


def _recompute(config: Config) -> Iterator[str]:
    parallel, name = config.parallel, "parallel.recompute_modules"
    modules = parallel.recompute_modules
    if parallel.recompute != "selective":
        if modules != ParallelConfig().recompute_modules:
            yield (
                f"{name} is {' '.join(modules)}, which parallel.recompute {parallel.recompute} does not read; set "
                "parallel.recompute selective, or leave it out"
            )
        return
    if not modules or len(set(modules)) < len(modules):
        found = " ".join(modules) or "empty"
        yield f"{name} is {found}; name what is recomputed, each once, or set parallel.recompute none"
    if {"mlp", "mlp_act"} <= set(modules):
        yield f"{name} has mlp and mlp_act, which is a part of it; leave one of them out"
    if "layernorm" in modules and not config.model.norm_first:
        yield (
            f"{name} has layernorm, but model.norm_first is false: what post-LN's norms give is the next residual, and "
            "to make it again takes as much as it saves; leave it out"
        )


def row_problems(config: Config) -> Iterator[str]:
    """Rows that cannot hold a sample, or that tensor-parallel ranks cannot divide; numbers are in their ranges."""
    data, parallel = config.data, config.parallel
    positions = config.model.max_position_embeddings
    if data.seq_length > positions:
        yield (
            f"data.seq_length is {data.seq_length}, model.max_position_embeddings only {positions}; "
            "lower the first or raise the second"
        )
    if data.most_row_places < data.seq_length:
        yield (
            f"data.micro_batch_tokens is {data.micro_batch_tokens}, but a row must hold one sample of "
            f"data.seq_length {data.seq_length}; raise the first to {data.seq_length} or more, or lower the second"
        )
    name, length = "micro_batch_tokens" if data.is_packed else "seq_length", data.most_row_places
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and length % tp:
        yield (
            f"data.{name} is {length}, with parallel.sequence_parallel it must be a multiple of "
            f"parallel.tensor_model_parallel_size {tp}; use {_nearest_multiple(length, tp)}"
        )
    yield from _fp8_rows(config)


def _fp8_rows(config: Config) -> Iterator[str]:
    data, grain = config.data, RowRule.of(config, 1).grain
    if config.train.fp8_recipe == "none" or data.micro_batch_slots % grain == 0:
        return
    name = "micro_batch_tokens" if data.is_packed else "micro_batch_size x seq_length"
    yield (
        f"data.{name} is {data.micro_batch_slots}, with train.fp8_recipe {config.train.fp8_recipe} it must be a "
        f"multiple of {grain}; use {_nearest_multiple(data.micro_batch_slots, grain)}"
    )


def _batch(config: Config, world_size: int) -> Iterator[str]:
    data, train, parallel = config.data, config.train, config.parallel
    if world_size % parallel.model_ranks:
        return
    dp = world_size // parallel.model_ranks
    micro_batches = dp * RowRule.of(config, dp).least_micro_batches
    who = f"each of {dp} data-parallel ranks"
    if micro_batches > dp:
        who = f"{micro_batches // dp} micro batches, one for each pipeline stage, on {who}"
    batch, chunk = train.global_batch_size, data.micro_batch_size * dp
    compared = chunk if config.objective.scl_negatives == "all_ranks" else data.micro_batch_size
    if "scl" in config.objective.main and not data.is_packed and compared == 1:
        yield (
            "data.micro_batch_size is 1, but objective.main scl compares a sample with others of its micro batch; use "
            "2 or more, or data.row_format packed"
        )
    full = FULL_ROW_SAMPLES * dp * parallel.pipeline_model_parallel_size * (1 if batch else data.seq_length)
    or_more = f"or more ({full} are enough for full rows)" if data.is_packed else "or more"
    if batch == 0:
        least = micro_batches * data.seq_length
        if train.global_batch_tokens < least:
            yield (
                f"train.global_batch_tokens is {train.global_batch_tokens}, less than one sample of data.seq_length "
                f"{data.seq_length} for {who}; use {least} {or_more}, or start fewer processes"
            )
    elif batch < micro_batches:
        yield (
            f"train.global_batch_size is {batch}, less than one sample for {who}; "
            f"use {micro_batches} {or_more}, or start fewer processes"
        )
    elif not data.is_packed and batch % chunk:
        yield (
            f"train.global_batch_size is {batch}, must be divisible by {chunk} = data.micro_batch_size "
            f"{data.micro_batch_size} x {dp} data-parallel ranks; use {_nearest_multiple(batch, chunk)}, "
            "another micro_batch_size, or data.row_format packed"
        )


def _schedule(config: Config) -> Iterator[str]:
    optimizer, steps = config.optimizer, config.train.train_steps
    if optimizer.lr_warmup_steps > steps:
        yield (
            f"optimizer.lr_warmup_steps is {optimizer.lr_warmup_steps}, more than train.train_steps {steps}; "
            "lower the first (6 to 8% of the steps is usual) or raise the second"
        )
    try:
        decay = steps_of(optimizer.lr_decay_steps, steps)
    except UserError as error:
        yield f"optimizer.lr_decay_steps: {error}"
    else:
        if decay > steps:
            yield (
                f"optimizer.lr_decay_steps is {optimizer.lr_decay_steps}, more than train.train_steps {steps}; "
                "lower it, or give a share such as 10%"
            )
    try:
        own = optimizer.auxiliary_schedule
    except UserError as error:
        yield f"optimizer.auxiliary_lr_schedule: {error}"
    else:
        yield from own.problems("optimizer.auxiliary_lr_schedule", steps, Range(0, 1, has_high=True)) if own else ()
    if optimizer.initial_loss_scale < optimizer.min_loss_scale:
        yield (
            f"optimizer.initial_loss_scale is {optimizer.initial_loss_scale:g}, less than "
            f"optimizer.min_loss_scale {optimizer.min_loss_scale:g}; swap them"
        )


def _steering(config: Config) -> Iterator[str]:
    may = [option.name for option in options_of(Config) if OVERRIDE_MAY_CHANGE in option.marks]
    for name in config.train.override:
        if name not in may:
            yield f"train.override names {name}, which would make another run; it may name {', '.join(may)}"
    for written in config.train.skip_steps:
        try:
            if step_window(written).stop >= config.train.train_steps:
                yield f"train.skip_steps {written} reaches the last of {config.train.train_steps} steps; end before it"
        except UserError as error:
            yield f"train.skip_steps: {error}"


def _optimizers(config: Config) -> Iterator[str]:
    optimizer, plain, source = config.optimizer, OptimizerConfig(), config.corruption.source
    kinds = {"matrices": optimizer.matrices, "auxiliary_matrices": optimizer.auxiliary_matrices}
    readers = {
        "muon_lr": ["matrices"],
        "auxiliary_muon_lr": ["auxiliary_matrices"],
        "muon_momentum": ["matrices", "auxiliary_matrices"],
    }
    for name, value in flatten(optimizer).items():
        if value == getattr(plain, name):
            continue
        if name.startswith("auxiliary_") and not config.corruption.trains_auxiliary:
            yield (
                f"optimizer.{name} is {value}, but with corruption.source {source} no auxiliary is trained; "
                "leave it out"
            )
        elif name in readers and all(kinds[reader] == "adam" for reader in readers[name]):
            options = " or ".join(f"optimizer.{reader}" for reader in readers[name])
            yield f"optimizer.{name} is {value}, which adam does not read; leave it out, or set {options} muon"
    if "muon" in kinds.values() and config.train.precision == "fp16" and not config.parallel.grad_reduce_in_fp32:
        yield (
            "parallel.grad_reduce_in_fp32 is false, but Muon's directions travel in the gradients' buffers and are too "
            "small for train.precision fp16; set it true, or use bf16"
        )


def _precision(config: Config, device: str) -> Iterator[str]:
    if config.train.precision == "bf16" and device == "cpu" and config.train.device == "auto":
        yield (
            "train.precision is bf16, but torch finds no GPU, and on a CPU fp32 is faster; check the driver, or take a "
            "small model (--config demo), or this one by train.device cpu and train.precision fp32"
        )
    if config.train.precision == "fp16" and device == "cpu":
        # Half-precision matrix products on processors are some twenty times slower than fp32.
        yield "train.precision is fp16, which needs a GPU; on the cpu use fp32 or bf16"


def _kernels(config: Config, device: str) -> Iterator[str]:
    model, seq_length = config.model, config.data.seq_length
    if device != "cuda" or config.train.fused == "reference":
        return
    remedy = "set train.fused to reference, which is slower"
    widths = {"model.embedding_size": model.embedding_size}
    for prefix, sizes in _encoders(model):
        widths[f"{prefix}hidden_size"] = sizes.hidden_size
        if sizes.head_dim not in HEAD_DIMS:
            yield (
                f"{prefix}hidden_size / {prefix}num_attention_heads is {sizes.head_dim}, the attention kernels have "
                f"{', '.join(map(str, HEAD_DIMS))}; change {prefix}num_attention_heads, or {remedy}"
            )
    for name, width in widths.items():
        if width > WIDEST:
            yield f"{name} is {width}, the LayerNorm kernels take at most {WIDEST}; {remedy}"
    if seq_length > MOST_POSITIONS:
        yield f"data.seq_length is {seq_length}, the attention kernels take at most {MOST_POSITIONS}; {remedy}"


def _phases(config: Config, world_size: int, device: str) -> Iterator[str]:
    def of_samples(config: Config) -> list[str]:
        return [*row_problems(config), *_batch(config, world_size), *_kernels(config, device)]

    steps, known, before = config.train.train_steps, of_samples(config), 0
    if config.train.phases and config.corruption.source == "cached":
        yield (
            "train.phases are given and corruption.source is cached, but caches are of runs without phases; "
            "use source frozen, or leave train.phases empty"
        )
    for number, phase in enumerate(config.train.phases, 1):
        name = f"phase {number} of train.phases"
        outside = out_of_range({option.name: option for option in options_of(Phase)}, flatten(phase))
        if not outside:
            # What 0 is for a phase, the run's own options do not have; all else has their limits.
            outside = _out_of_range(config.by_phase[number])
        yield from (f"{name}: {one}" for one in outside)
        if not outside:
            own = of_samples(config.by_phase[number])
            yield from (f"{name}: {one}" for one in own if one not in known)
        try:
            start = steps_of(phase.start, steps)
        except UserError as error:
            yield f"{name}: start: {error}"
            continue
        if not before < start < steps:
            yield (
                f"{name}: start is {phase.start}, step {start:,}; must be above {before:,}, where what is before it "
                f"begins, and below train.train_steps {steps:,}"
            )
        before = max(start, before)


def _initial_weights(config: Config) -> Iterator[str]:
    train = config.train
    if train.initialize_from and train.branch_from:
        yield (
            f"train.initialize_from is {' '.join(train.initialize_from)}, but a run that branches from "
            f"{train.branch_from} has that checkpoint's weights; leave one of them out"
        )
    if train.initialize_positions != "same" and not train.initialize_from:
        yield (
            f"train.initialize_positions is {train.initialize_positions}, but without train.initialize_from all "
            "positions start at random; leave it out"
        )
    if train.initialize_fresh and not train.initialize_from:
        yield (
            f"train.initialize_fresh is {' '.join(train.initialize_fresh)}, but without train.initialize_from "
            "all parts start at random; leave it out"
        )


def _paths(config: Config) -> Iterator[str]:
    data = config.data
    if not data.train:
        yield "data.train is empty; give what tools/preprocess_data.py wrote: --data.train PREFIX..."
    if not config.train.output:
        yield "train.output is empty; name the run's folder: --train.output DIR"
    if config.train.probe_interval > 0 and not config.train.probe_tasks:
        yield (
            f"train.probe_interval is {config.train.probe_interval}, but train.probe_tasks is empty; give a folder "
            "that tools/make_tasks.py wrote, or set train.probe_interval 0"
        )
    if config.train.probe_interval == 0 and config.train.probe_tasks:
        yield (
            f"train.probe_tasks is {config.train.probe_tasks}, but train.probe_interval is 0: nothing is probed; "
            "say after how many steps, such as train.probe_interval 1000, or leave train.probe_tasks out"
        )
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
