"""Mistakes in what a run learns and reads: objectives, masks, what encoders share, replacements, early exits.

Which options of the papers' variants go together, whatever the processes; the rest is in problems.py.
"""

from collections.abc import Iterator

from metro_megatron.cli.options import Range
from metro_megatron.config.schema import Config, CorruptionConfig
from metro_megatron.errors import UserError
from metro_megatron.schedule import Schedule


def variant_problems(config: Config) -> Iterator[str]:
    """See `problems`, whose numbers are in their ranges by now."""
    yield from _objective(config)
    yield from _tied_head(config)
    yield from _masking(config)
    yield from _sharing(config)
    yield from _corruption(config)
    yield from _early_exit(config)


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
    if main and not any(getattr(config.objective, f"{term}_weight", 1.0) for term in main):
        yield f"objective.{main[0]}_weight is 0, and main learns nothing else; give it a weight"
    specials = len(config.model.special_ids.all)
    if "cloze" in main and config.model.vocab_size < specials + 3:
        yield (
            f"model.vocab_size is {config.model.vocab_size}, but objective.main cloze offers three words; "
            f"use {specials + 3} or more"
        )
    if clm != "simplified" and main and not {"rtd", "clm"} <= set(main):
        yield (
            f"objective.clm is {clm}, which weighs clm by what rtd says, but objective.main is {' '.join(main)}; "
            "give both, or set objective.clm simplified"
        )


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
    if model.untied_positions and model.position_init == "zero":
        yield (
            "model.position_init is zero, but with model.untied_positions a norm reads the positions, which has no "
            "gradient to speak of at zero; use normal"
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
    specials = len(config.model.special_ids.all)
    if corruption.disallow_correct and config.model.vocab_size < specials + 2:
        yield (
            f"corruption.disallow_correct is true, but model.vocab_size {config.model.vocab_size} has no second word; "
            f"use a vocabulary of {specials + 2} or more"
        )
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
