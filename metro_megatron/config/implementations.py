"""Mistakes in the choice of libraries and of FP8, which only Transformer Engine's layers compute in."""

from collections.abc import Iterator

from metro_megatron.config.rows import GRAIN
from metro_megatron.config.schema import Config


def implementation_problems(config: Config, device: str) -> Iterator[str]:
    """What of the options cannot be together, or not on this device; what is not installed metro_megatron/nvidia.py
    says."""
    parallel, optimizer = config.parallel, config.optimizer
    if device == "cpu":
        if parallel.transformer_impl == "transformer_engine":
            yield "parallel.transformer_impl is transformer_engine, which needs a GPU; on the cpu use auto or local"
        if optimizer.adam_impl != "torch":
            yield f"optimizer.adam_impl is {optimizer.adam_impl}, which needs a GPU; on the cpu use torch"
    if config.train.fp8_recipe != "none":
        yield from _fp8(config, device)


def _fp8(config: Config, device: str) -> Iterator[str]:
    asked, train = f"train.fp8_recipe is {config.train.fp8_recipe}", config.train
    if device == "cpu":
        yield f"{asked}, which needs a GPU; on the cpu set it none"
    elif config.parallel.transformer_impl == "local":
        yield (
            f"{asked}, but parallel.transformer_impl is local, whose layers compute nothing in FP8; set it "
            "transformer_engine"
        )
    if train.precision != "bf16":
        yield f"{asked}, but train.precision is {train.precision}; all that is not FP8 must be bf16"
    if config.corruption.source == "main":
        yield f"{asked}, but with corruption.source main phase 1 reads layers by themselves, in bf16; set it none"
    if config.early_exit.layers:
        yield (
            f"{asked}, but behind early exits layers read rows in numbers that FP8 products do not take; leave "
            "early_exit.layers empty, or set it none"
        )
    yield from _widths(config, asked)


def _widths(config: Config, asked: str) -> Iterator[str]:
    tp = config.parallel.tensor_model_parallel_size
    encoders = {"model.": config.model.main}
    if config.corruption.trains_auxiliary:
        encoders["model.auxiliary_"] = config.model.auxiliary
    for prefix, sizes in encoders.items():
        for name, width in (("hidden_size", sizes.hidden_size), ("ffn_hidden_size", sizes.ffn_hidden_size)):
            if width % (GRAIN * tp):
                yield (
                    f"{asked}, but {prefix}{name} is {width}, must be a multiple of {GRAIN * tp}: {GRAIN} x "
                    f"parallel.tensor_model_parallel_size {tp}; change one of them, or set it none"
                )
