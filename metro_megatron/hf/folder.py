"""Folders of transformers, whoever has written them, read without running code of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from metro_megatron.errors import UserError
from metro_megatron.hf.configuration_metro import MetroConfig


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
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: unreadable ({error}); write the folder again") from error
    if model_type == MetroConfig.model_type:
        return MetroConfig.from_pretrained(folder, **settings)
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{folder}: transformers has no model_type {model_type!r}, and code of the folder is not run; give a model "
            "that transformers loads without trust_remote_code"
        )
    return AutoConfig.from_pretrained(folder, **settings)
