"""Every mistake that a configuration and the number of processes show before anything is built."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from fused.attention import HEAD_DIMS, MOST_POSITIONS
from fused.layer_norm import WIDEST
from metro_megatron.cli.options import Range, flatten, options_of, out_of_range
from metro_megatron.config.schema import Config, CorruptionConfig, EncoderSizes, ModelConfig
from metro_megatron.errors import UserError
from metro_megatron.schedule import Schedule
from metro_megatron.vocabulary import NUM_SPECIALS


def problems(config: Config, world_size: int, device: Literal["cpu", "cuda"] | None = None) -> list[str]:
    """What is wrong with `config` on `world_size` processes; each entry says value, limit and remedy.

    `device` is what `train.device` "auto" turned out to be, where that is known. Numbers outside their
    ranges hide the checks that would calculate with them. Evaluation without validation data is no mistake:
    it is skipped.
    """
    found = out_of_range({option.name: option for option in options_of(Config)}, flatten(config))
    if not found:
        found += _model(config)
        found += _objective(config)
        found += _tied_head(config)
        found += _masking(config)
        found += _sharing(config)
        found += _early_exit(config)
        found += _layout(config, world_size)
        found += _rows(config)
        found += _batch(config, world_size)
        found += _schedule(config)
        found += _corruption(config)
        found += _precision(config, device or config.train.device)
        found += _kernels(config, device or config.train.device)
    return found + list(_paths(config))


def _model(config: Config) -> Iterator[str]:
    model = config.model
    for prefix, sizes in _encoders(model):
        heads, width = sizes.num_attention_heads, sizes.hidden_size
        yield from _divides(f"{prefix}num_attention_heads", heads, f"{prefix}hidden_size", width)
    yield from model.position_scheme.problems()


def _objective(config: Config) -> Iterator[str]:
    main, clm, source = config.objective.main, config.objective.clm, config.corruption.source
    if not main:
        yield "objective.main is empty; name what main learns: rtd clm is METRO's"
    if len(set(main)) < len(main):
        yield f"objective.main is {' '.join(main)}, which names a loss twice; give each once and weigh it by its option"
    if "mlm" in main and len(set(main)) > 1:
        yield (
            f"objective.main is {' '.join(main)}, but mlm reads masked text and the others corrupted text; "
            "use mlm alone, or clm in its place"
        )
    if main == ["mlm"] and source != "none":
        yield f"corruption.source is {source}, but objective.main mlm reads masked text; set corruption.source none"
    if source == "none" and main and "mlm" not in main:
        yield (
            f"corruption.source is none, but objective.main {' '.join(main)} reads corrupted text; use another source, "
            "such as auxiliary, or objective.main mlm"
        )
    if "cloze" in main and source != "auxiliary":
        yield (
            f"corruption.source is {source}, but the candidates of objective.main cloze come from an auxiliary model; "
            "use source auxiliary, or another objective"
        )
    if "cloze" in main and config.model.vocab_size < NUM_SPECIALS + 3:
        yield (
            f"model.vocab_size is {config.model.vocab_size}, but objective.main cloze offers three words; "
            f"use {NUM_SPECIALS + 3} or more"
        )
    if clm != "simplified" and main and not {"rtd", "clm"} <= set(main):
        yield (
            f"objective.clm is {clm}, which weighs clm by what rtd says, but objective.main is {' '.join(main)}; "
            "give both, or set objective.clm simplified"
        )


def _encoders(model: ModelConfig) -> Iterator[tuple[str, EncoderSizes]]:
    """With what the options of an encoder begin, and its sizes; the auxiliary's where they are not main's."""
    yield "model.", model.main
    if replace(model.auxiliary, num_layers=model.num_layers) != model.main:
        yield "model.auxiliary_", model.auxiliary


def _tied_head(config: Config) -> Iterator[str]:
    model, tied = config.model, {"clm", "cloze", "mlm"} & set(config.objective.main)
    if tied and model.lm_head == "linear" and model.table_width != model.hidden_size:
        yield (
            f"model.lm_head is linear, but model.embedding_size {model.embedding_size} is not model.hidden_size "
            f"{model.hidden_size}: the decoder is the token table; set model.lm_head dense, or model.embedding_size 0"
        )


def _masking(config: Config) -> Iterator[str]:
    keep, random = config.objective.keep_probability, config.objective.random_probability
    if keep + random > 1:
        yield (
            f"objective.keep_probability {keep:g} and objective.random_probability {random:g} are shares of the masked "
            f"positions, their sum {keep + random:g} must be at most 1; lower one of them"
        )


def _sharing(config: Config) -> Iterator[str]:
    model, source, main = config.model, config.corruption.source, config.objective.main
    if model.untied_positions and "position" in model.shared_parts:
        yield (
            f"model.shared_embeddings is {model.shared_embeddings}, but with model.untied_positions the embedding has "
            "no positions to share; use token or none"
        )
    if model.shared_lm_bias and source != "auxiliary":
        yield (
            f"model.shared_lm_bias needs an auxiliary model that trains, corruption.source is {source}; "
            "set model.shared_lm_bias false"
        )
    if model.shared_lm_bias and not {"clm", "mlm"} & set(main):
        yield (
            f"model.shared_lm_bias needs a language modelling head on main, objective.main is {', '.join(main)}; "
            "add clm, or set model.shared_lm_bias false"
        )
    if model.shared_lm_bias and "cloze" in main:
        yield (
            f"model.shared_lm_bias is for two language models, objective.main {', '.join(main)} has cloze, whose bias "
            "is its own; leave cloze out, or set model.shared_lm_bias false"
        )


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
    for prefix, sizes in _encoders(model):
        yield from _divides(tensor, tp, f"{prefix}num_attention_heads", sizes.num_attention_heads)
        yield from _divides(tensor, tp, f"{prefix}ffn_hidden_size", sizes.ffn_hidden_size)
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


def _corruption(config: Config) -> Iterator[str]:
    corruption, source = config.corruption, config.corruption.source
    if source == "frozen" and not corruption.frozen_model:
        yield "corruption.source is frozen, but corruption.frozen_model is empty; name the model's folder"
    if source == "cached" and not corruption.cache:
        yield "corruption.source is cached, but corruption.cache is empty; name what tools/cache_corruption.py wrote"
    drawn_by_models = ("auxiliary", "frozen", "cached", "main")
    yield from _unread(config, "frozen_model", ("frozen", "cached"))
    yield from _unread(config, "cache", ("cached",))
    yield from _unread(config, "unigram_power", ("unigram",))
    yield from _unread(config, "main_layer", ("main",))
    yield from _unread(config, "disallow_correct", (*drawn_by_models, "uniform", "unigram"))
    yield from _unread(config, "temperature", drawn_by_models)
    yield from _unread(config, "temperature_schedule", drawn_by_models)
    yield from _temperature(config)
    if config.model.auxiliary_dropout != "zero" and source not in ("auxiliary", "main"):
        yield (
            f"model.auxiliary_dropout is {config.model.auxiliary_dropout}, but with corruption.source {source} no "
            "auxiliary is trained; leave it out"
        )
    if corruption.main_layer > config.model.num_layers:
        depth = config.model.num_layers
        yield f"corruption.main_layer is {corruption.main_layer}, but main has {depth} layers; use 1 to {depth}"
    stages = config.parallel.pipeline_model_parallel_size
    if source == "main" and stages > 1:
        yield (
            f"corruption.source is main, but parallel.pipeline_model_parallel_size is {stages}: the layers that fill "
            "the masks of all micro batches are on some stages only; use 1, or another source"
        )


def _temperature(config: Config) -> Iterator[str]:
    corruption, schedule = config.corruption, config.corruption.temperature_schedule
    first, final = corruption.temperature, corruption.final_temperature
    for name, reader in (("temperature_tau", "exponential"), ("temperature_power", "polynomial")):
        if _is_changed(config, name) and schedule != reader:
            yield (
                f"corruption.{name} is {getattr(corruption, name):g}, which corruption.temperature_schedule {schedule} "
                f"does not read; leave it out, or set the schedule to {reader}"
            )
    if schedule == "constant" and _is_changed(config, "final_temperature"):
        yield (
            f"corruption.final_temperature is {final:g}, but corruption.temperature_schedule is constant; leave it "
            "out, or set the schedule to exponential, linear or polynomial"
        )
    elif schedule != "constant" and first <= final:
        yield (
            f"corruption.temperature is {first:g}, must be greater than corruption.final_temperature {final:g}, "
            f"towards which the {schedule} schedule falls; 2 is Fast-ELECTRA's"
        )


def _unread(config: Config, name: str, sources: tuple[str, ...]) -> Iterator[str]:
    """An option that was changed, and that only these sources read."""
    if _is_changed(config, name) and config.corruption.source not in sources:
        yield (
            f"corruption.{name} is {getattr(config.corruption, name)}, which corruption.source "
            f"{config.corruption.source} does not read; leave it out, or set the source to {' or '.join(sources)}"
        )


def _is_changed(config: Config, name: str) -> bool:
    return getattr(config.corruption, name) != getattr(CorruptionConfig(), name)


def _precision(config: Config, device: str) -> Iterator[str]:
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
