"""The model of a task from any folder that transformers reads: a pretrained encoder under a fresh head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from metro_megatron.errors import UserError
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.export import finish_folder
from metro_megatron.hf.folder import folder_config, folder_model, folder_tokenizer
from metro_megatron.hf.modeling_metro import (
    MetroForMultipleChoice,
    MetroForQuestionAnswering,
    MetroForSequenceClassification,
    MetroForTokenClassification,
    MetroModel,
)
from metro_megatron.tokenizer.tokenizer import TOKENIZER_FILES, copy_tokenizer

Head: TypeAlias = Literal["sequence_classification", "token_classification", "multiple_choice", "question_answering"]
"""What stands on the encoder, as transformers names it: AutoModelForSequenceClassification and so on."""

AUTO_MODELS: dict[Head, Any] = {
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "multiple_choice": AutoModelForMultipleChoice,
    "question_answering": AutoModelForQuestionAnswering,
}
METRO_MODELS: dict[Head, type[PreTrainedModel]] = {
    "sequence_classification": MetroForSequenceClassification,
    "token_classification": MetroForTokenClassification,
    "multiple_choice": MetroForMultipleChoice,
    "question_answering": MetroForQuestionAnswering,
}
HEAD_DROPOUTS = (
    *("classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "qa_dropout"),
    *("pooler_dropout", "cls_dropout", "head_dropout"),
)
"""What configurations call the dropout of heads; of some it is the encoder's, which stays."""
_SHORTEST = 8
_LONGEST = 1_000_000
"""Tokens; transformers writes 1e30 where a tokenizer knows no limit."""
_SHOWN_WEIGHTS = 3


def read_config(folder: Path, settings: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a folder with a task's settings, without running code of the folder.

    Raises UserError for a folder that is not there or that transformers cannot read by itself.
    """
    # Labels of a task that the folder was fine-tuned on are none of this one's.
    settings = {"problem_type": None, **settings}
    if not settings.keys() & {"id2label", "num_labels"}:
        settings["num_labels"] = 2
    return folder_config(folder, **settings)


def read_tokenizer(folder: Path, config: PreTrainedConfig, max_length: int) -> PreTrainedTokenizerFast:
    """The folder's tokenizer, cutting at max_length tokens (0: at as many as it and the model take).

    Raises UserError for a folder without one, one that does not fit the model, and a length that the model cannot read.
    """
    tokenizer: Any = _load_tokenizer(folder, config)
    problems = []
    if not tokenizer.is_fast:
        problems.append(f"{folder}: its tokenizer has no tokenizer.json, which says where tokens stand in a text")
    if tokenizer.pad_token_id is None:
        problems.append(f"{folder}: its tokenizer has no padding token; set pad_token in tokenizer_config.json")
    if len(tokenizer) > config.vocab_size:
        problems.append(f"{folder}: has {len(tokenizer)} ids, the model {config.vocab_size}; give its own tokenizer")
    longest = _num_positions(config)
    if max_length > longest:
        problems.append(f"max_length is {max_length}, but the model has {longest} positions; give at most {longest}")
    if 0 < max_length < _SHORTEST:
        problems.append(f"max_length is {max_length}; give at least {_SHORTEST}, of which specials take up to 4")
    if max_length == 0 and min(longest, tokenizer.model_max_length) > _LONGEST:
        problems.append("neither model nor tokenizer says how long a text may be; give max_length")
    if problems:
        raise UserError(problems)
    tokenizer.model_max_length = max_length or min(longest, tokenizer.model_max_length)
    tokenizer.padding_side = "right"  # tasks know tokens by their place in the row
    return tokenizer


def build_model(head: Head, folder: Path, config: PreTrainedConfig, from_scratch: bool) -> PreTrainedModel:
    """The folder's encoder in FP32 under a fresh head, or all of it fresh; torch's generator draws what is fresh.

    The head is drawn as transformers' from_pretrained draws it. Raises UserError if the architecture has no such head,
    or a weight of the encoder is not in the folder; its pooler may be: some pretraining has none.
    """
    kind = model_class(head, folder, config)
    model = kind(config) if from_scratch else _with_fresh_head(kind, folder, config)
    if head == "multiple_choice":
        ignore_missing_choices(model)
    return model


def _with_fresh_head(kind: type[PreTrainedModel], folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        model, info = folder_model(kind, folder, config=config, ignore_mismatched_sizes=True)
    except UserError as error:
        raise UserError([f"{problem}, or use --from_scratch" for problem in error.problems]) from error
    encoder = f"{model.base_model_prefix}."
    fresh = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    lacking = sorted(name for name in fresh if name.startswith(encoder) and not name.startswith(f"{encoder}pooler."))
    if lacking:
        shown = ", ".join(lacking[:_SHOWN_WEIGHTS])
        raise UserError(
            f"{folder}: {len(lacking)} weights of the encoder are missing or of another size than config.json says "
            f"({shown}); give a folder of the whole encoder, or use --from_scratch"
        )
    found = {name: value for name, value in model.state_dict().items() if not name.startswith(encoder)}
    if found.keys() - fresh:
        # The folder is of a fine-tuned model, whose head answers another question.
        drawn = kind(config).state_dict()
        model.load_state_dict({name: drawn[name] for name in found}, strict=False)
    return model


def ignore_missing_choices(model: PreTrainedModel) -> None:
    """From now on choices that attention_mask [B, A, S] shows no token of get the lowest score, and no share of a loss.

    So a batch may have texts of different numbers of choices, whatever the architecture.
    """

    def ignore(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        mask = kwargs.get("attention_mask")
        is_missing = None if mask is None else ~mask.any(-1)
        if is_missing is None or not is_missing.any():
            return output
        logits = output.logits.masked_fill(is_missing, torch.finfo(output.logits.dtype).min)
        output.logits = logits
        if kwargs.get("labels") is not None:
            output.loss = functional.cross_entropy(logits.float(), kwargs["labels"])
        return output

    model.register_forward_hook(ignore, with_kwargs=True)


def set_task_dropout(model: PreTrainedModel, probability: float) -> None:
    """Give it to all dropout that stands on the encoder, and to the configuration, by the names that heads have."""
    of_encoder = set(model.base_model.modules())
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module not in of_encoder:
            module.p = probability
    for name in HEAD_DROPOUTS:
        if hasattr(model.config, name):
            setattr(model.config, name, probability)


def write_model(model: PreTrainedModel, tokenizer_folder: Path, output: Path) -> None:
    """Write a folder that Auto classes load: the model, and a copy of its tokenizer."""
    model.save_pretrained(output)
    if isinstance(model.config, MetroConfig):
        finish_folder(output)
    if all((tokenizer_folder / name).is_file() for name in TOKENIZER_FILES):
        copy_tokenizer(tokenizer_folder, output)
    else:
        _load_tokenizer(tokenizer_folder, model.config).save_pretrained(output)


def _load_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    try:
        return folder_tokenizer(folder, config)
    except UserError as error:
        raise UserError([f"{problem}, or give their folder with --tokenizer" for problem in error.problems]) from error


def model_class(head: Head, folder: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Of a configuration with a head. Raises UserError if its architecture has no such head."""
    if isinstance(config, MetroConfig):
        return METRO_MODELS[head]
    classes = AUTO_MODELS[head]._model_mapping
    if type(config) not in classes:
        raise UserError(f"{folder}: transformers has no {head.replace('_', ' ')} model of type {config.model_type!r}")
    return classes[type(config)]


def _num_positions(config: PreTrainedConfig) -> int:
    """Tokens of the longest text that the model has positions for; very many if it does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return _LONGEST + 1
    with torch.device("meta"):
        encoder = MetroModel(config) if isinstance(config, MetroConfig) else AutoModel.from_config(config)
    # RoBERTa's positions, and those of its kind, begin behind the one that padding has.
    before = [
        module.padding_idx + 1
        for name, module in encoder.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return positions - max(before, default=0)
