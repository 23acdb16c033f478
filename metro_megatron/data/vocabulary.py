"""What a run's configuration takes from its data: the size of the vocabulary, and the ids of special tokens."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from metro_megatron.config.schema import Config, ModelConfig
from metro_megatron.data.manifest import Manifest, read_manifest
from metro_megatron.errors import UserError


def with_vocabulary(config: Config) -> Config:
    """The configuration of a run on data.train: what of the vocabulary has its default becomes the tokenizer's.

    As it was where the first dataset cannot be read, which opening it explains.
    """
    try:
        manifest = read_manifest(config.data.train[0])
    except (UserError, IndexError):
        return config
    default = ModelConfig()
    taken = {
        name: value
        for name, value in _vocabulary(manifest).items()
        if getattr(config.model, name) == getattr(default, name)
    }
    return replace(config, model=replace(config.model, **taken))


def vocabulary_problems(model_config: ModelConfig, manifest: Manifest) -> Iterator[str]:
    """Where a configuration says other than the tokenizer of a dataset."""
    for name, value in _vocabulary(manifest).items():
        given = getattr(model_config, name)
        if given != value:
            yield (
                f"model.{name} is {given}, but that of the shards' tokenizer is {value}: set model.{name} to {value}, "
                "or preprocess with another tokenizer"
            )


def _vocabulary(manifest: Manifest) -> dict[str, Any]:
    """Options of ModelConfig."""
    special_ids = manifest.special_ids
    return {
        "vocab_size": manifest.vocab_size,
        "bos_token_id": special_ids.bos,
        "pad_token_id": special_ids.pad,
        "eos_token_id": special_ids.eos,
        "mask_token_id": special_ids.mask,
        "other_special_ids": list(special_ids.others),
    }
