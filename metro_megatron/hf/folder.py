"""Folders of transformers, whoever has written them, read without running code of theirs.

What every tool opens a model and its tokenizer with: what is missing or damaged is a UserError of path, cause, remedy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from metro_megatron.errors import UserError
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.stored import in_short
from metro_megatron.tokenizer.tokenizer import CONFIG_FILE, JSON_FILE, MODEL_FILE, TOKENIZER_FILES, Tokenizer

_SHOWN_WEIGHTS = 3


def folder_config(folder: Path, **settings: Any) -> PreTrainedConfig:
    """The configuration of a folder, with settings in place of its own.

    Raises UserError for a folder that is not there, damaged, or that transformers cannot read by itself.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a model of the hub must be downloaded first (hf download)")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give a folder that tools/convert_checkpoint.py or save_pretrained has written"
        ) from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({error}); write the folder again") from error
    is_ours = model_type == MetroConfig.model_type
    if not is_ours and model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{folder}: transformers has no model_type {model_type!r}, and code of the folder is not run; give a model "
            "that transformers loads without trust_remote_code"
        )
    kind: Any = MetroConfig if is_ours else AutoConfig
    try:
        return kind.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:  # every configuration checks its values by itself
        raise UserError(f"{path}: transformers cannot read it ({in_short(error)}); give another copy") from error


def exported_config(folder: Path) -> MetroConfig:
    """`folder_config` of a folder that is ours. Raises UserError for another."""
    config = folder_config(folder)
    if not isinstance(config, MetroConfig):
        raise UserError(
            f"{folder}: is a model of type {config.model_type!r}; give a folder that tools/convert_checkpoint.py wrote"
        )
    return config


def folder_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes of a folder's files, for the model of a configuration.

    Raises UserError where there is none or one of its files is damaged; also of a file that only later tools read.
    """
    is_ours, has = isinstance(config, MetroConfig), {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if JSON_FILE not in has and (is_ours or CONFIG_FILE not in has):
        raise UserError(f"{folder}: has no {JSON_FILE}; copy the files of the model's tokenizer there")
    if has == set(TOKENIZER_FILES) or (is_ours and MODEL_FILE in has):
        Tokenizer.from_folder(folder)
    kind: Any = PreTrainedTokenizerFast if is_ours else AutoTokenizer
    settings = {} if is_ours else {"config": config}
    try:
        found: PreTrainedTokenizerBase = kind.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"{folder}: its tokenizer is unreadable ({in_short(error)}); give another copy of the files "
            f"{', '.join(sorted(path.name for path in folder.glob('*token*')))}"
        ) from error
    return found


def folder_model(kind: Any, folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """What `kind.from_pretrained` makes of a folder, in FP32, and its report of missing and other weights.

    Raises UserError for weights that are not there or unreadable.
    """
    try:
        found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **settings
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: its weights cannot be read ({in_short(error)}); give another copy") from error
    return found


def whole_model(kind: Any, folder: Path) -> Any:
    """`folder_model`'s model. Raises UserError where a weight is not there, too, which would be drawn at random."""
    model, report = folder_model(kind, folder)
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise UserError(
            f"{folder}: {len(lacking)} weights of {kind.__name__} are missing ({', '.join(lacking[:_SHOWN_WEIGHTS])}); "
            "give a folder as it was pretrained, not one that was fine-tuned"
        )
    return model
