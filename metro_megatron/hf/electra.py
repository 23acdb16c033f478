"""ELECTRA of transformers, generator and discriminator, from and to our pair: the same model under other names.

Three things are other than names. Theirs adds the embedding of segment 0 to every token of a single text, which is part
of our position table; a run keeps a file of both, so that segments come back (`segments_of`). Their discriminator says
replaced where ours says original: the last layer has the opposite sign. And theirs has two token tables where our
encoders share one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, PreTrainedConfig, PreTrainedModel

from metro_megatron.config.schema import EncoderSizes, ModelConfig
from metro_megatron.errors import UserError
from metro_megatron.files import refuse_foreign, whole_folder
from metro_megatron.hf.card import fact_tables
from metro_megatron.hf.export import refuse_other_tokenizer, write_tokenizer
from metro_megatron.hf.folder import folder_config
from metro_megatron.hf.pretrained import Pretrained
from metro_megatron.hf.stored import LazyTensors, in_short, read_json, stored_tensors, write_weights
from metro_megatron.hf.weights import METRO, all_ties, hf_tensors
from metro_megatron.tokenizer.tokenizer import TOKENIZER_FILES

Role = Literal["generator", "discriminator"]
ENCODERS: dict[Role, str] = {"generator": "auxiliary", "discriminator": "metro"}
"""Our encoder by ELECTRA's."""
CLASSES: dict[Role, type[PreTrainedModel]] = {"generator": ElectraForMaskedLM, "discriminator": ElectraForPreTraining}
MODULES = {
    "generator_predictions.dense": "auxiliary_head.dense",
    "generator_predictions.LayerNorm": "auxiliary_head.norm",
    "generator_lm_head": "auxiliary_head.decoder",
    "discriminator_predictions.dense": "rtd_head.dense",
    "discriminator_predictions.dense_prediction": "rtd_head",
    "electra.embeddings.word_embeddings": "{encoder}.embeddings.word_embeddings",
    "electra.embeddings.position_embeddings": "{encoder}.embeddings.position_embeddings",
    "electra.embeddings.LayerNorm": "{encoder}.embeddings.norm",
    "electra.embeddings_project": "{encoder}.embeddings.projection",
}
"""Our modules by theirs; {encoder} is the role's."""
LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}
"""Inside electra.encoder.layer.N and {encoder}.encoder.layer.N."""
TYPES = "electra.embeddings.token_type_embeddings.weight"
TABLE = "electra.embeddings.position_embeddings.weight"
FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "README.md", *TOKENIZER_FILES)
"""Patterns of all that a folder of one of the pair holds."""
SEGMENTS = 2
"""Rows of their embedding."""
BUFFERS = ("electra.embeddings.position_ids", "electra.embeddings.token_type_ids")
"""Constants that older files hold."""
POSITIONS = ".embeddings.position_embeddings.weight"
OPPOSITE = ("rtd_head.weight", "rtd_head.bias")
TITLE = "# ELECTRA {role}"
CARD = """---
library_name: transformers
tags:
- electra
- pretraining
---

{title}

Pretrained as one of a pair, on texts of one segment: {segments}. `{name}` loads the weights and the head; no other code
is needed.

## Facts

| | |
|---|---|
{facts}"""
FIXED: dict[str, Any] = {
    "relative_bucket": "none",
    "reset_cls": False,
    "untied_positions": False,
    "norm_first": False,
}
"""What of ModelConfig is the same in every ELECTRA, whose discriminator's rtd_head is dense."""


def open_electra(folder: Path) -> Pretrained:
    """The generator or the discriminator of a pair. Raises UserError for an ELECTRA that our model cannot be."""
    config = read_json(folder / "config.json")
    stored = stored_tensors(folder)
    role: Role = "generator" if any(name.startswith("generator_") for name in stored) else "discriminator"
    problems = list(_differences(folder, config))
    if "embeddings.word_embeddings.weight" in stored:
        problems.append(
            f"{folder}: was saved by ElectraModel, which does not say whether it is a generator or a discriminator; "
            "save it by ElectraForMaskedLM or ElectraForPreTraining"
        )
    makers, unread = {}, []
    for name, maker in stored.makers.items():
        ours = _our_name(name, role)
        if ours:
            makers[ours] = _changed(ours, maker, stored)
        elif name.startswith(("electra.", "generator_", "discriminator_")) and name not in (TYPES, *BUFFERS):
            problems.append(f"{folder}: {name} is no part of transformers' ELECTRA; give another model")
        elif name not in (TYPES, *BUFFERS):
            unread.append(name)
    if problems:
        raise UserError(problems)
    segments = {name: stored[name] for name in (TYPES, TABLE) if TYPES in stored and name in stored}
    return Pretrained(
        folder,
        LazyTensors(makers),
        _architecture(folder_config(folder), role),
        folder,
        unread=unread,
        segments={f"{role}.{name}": tensor for name, tensor in segments.items()},
    )


def _changed(name: str, maker: Callable[[], Tensor], stored: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """With our sign, and the positions of a text's only segment."""
    if name.endswith(POSITIONS) and TYPES in stored:
        return lambda: _joined(stored[TYPES], maker())
    return partial(_negative, maker) if name in OPPOSITE else maker


def _joined(types: Tensor, positions: Tensor) -> Tensor:
    """Positions with segment 0, as a single text of theirs has them and ours are."""
    return positions.float() + types[0].float()


def segments_of(role: Role, positions: Tensor, kept: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both segments and the positions of an export, of a run's positions and of what it began with (`kept`).

    Positions that no training has changed, and segments with them, are what they were, bit by bit. Else segment 0 is
    in the positions: its row is 0, that of segment 1 the difference between them. Zeros where a run began without any;
    of a pair that was given one model alone, the other has its segments.
    """
    whose = role if f"{role}.{TYPES}" in kept else next((one for one in CLASSES if f"{one}.{TYPES}" in kept), None)
    if whose is None:
        return torch.zeros(SEGMENTS, positions.size(1)), positions
    types, before = kept[f"{whose}.{TYPES}"].float(), kept[f"{whose}.{TABLE}"].float()
    if positions.equal(_joined(types, before)):
        return types, before
    return types - types[0], positions


def read_segments(path: Path | None) -> dict[str, Tensor]:
    """What `write_segments` wrote; nothing without a file. Raises UserError for a damaged one."""
    if path is None:
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: damaged ({in_short(error)}); give another copy, or remove it: segments become 0"
        ) from error


def write_segments(path: Path, kept: Mapping[str, Tensor]) -> None:
    """Of an ELECTRA that a run begins with: the embeddings of its segments and positions, in fp32."""
    save_file({name: tensor.float().contiguous() for name, tensor in kept.items()}, path)


def electra_roles(model_config: ModelConfig, objectives: Collection[str]) -> list[Role]:
    """Which models of a run become ELECTRA's. Raises UserError naming all that makes it no ELECTRA."""
    given = {**{name: getattr(model_config, name) for name in FIXED}, "rtd_head": model_config.rtd_head}
    problems = [
        f"model.{name} is {str(given[name]).lower()}, ELECTRA's is {str(value).lower()}"
        for name, value in {**FIXED, "rtd_head": "dense"}.items()
        if given[name] != value
    ]
    if "rtd" not in objectives:
        problems.append(f"objective.main is {' '.join(objectives)}, ELECTRA's discriminator has learned rtd")
    if problems:
        raise UserError([*problems, "no ELECTRA has these: write the folder with --format metro"])
    return ["generator", "discriminator"] if model_config.auxiliary_num_layers else ["discriminator"]


def electra_tensors(
    exported: LazyTensors, model_config: ModelConfig, role: Role, kept: Mapping[str, Tensor] | None = None
) -> LazyTensors:
    """One model's, by transformers' names, of the tensors of `hf_tensors`; kept: see `segments_of`."""
    with torch.device("meta"):
        names = CLASSES[role](electra_config(model_config, role)).state_dict().keys()
    ties = all_ties(model_config, ["rtd"])
    makers: dict[str, Callable[[], Tensor]] = {}
    for name in names - {TYPES}:
        ours = _our_name(name, role)
        maker = exported.makers[ours if ours in exported else ties[ours]]
        makers[name] = partial(_negative, maker) if ours in OPPOSITE else maker
    positions = makers[TABLE]
    makers[TYPES] = lambda: segments_of(role, positions(), kept or {})[0]
    makers[TABLE] = lambda: segments_of(role, positions(), kept or {})[1]
    return LazyTensors(makers)


def _negative(maker: Callable[[], Tensor]) -> Tensor:
    return -maker()


def write_electra_folders(
    output: Path,
    tensors: Mapping[str, Tensor],
    model_config: ModelConfig,
    tokenizer_folder: Path,
    card: Mapping[str, object],
    verify: Callable[[Path], Mapping[str, object]] | None = None,
    objectives: Collection[str] = METRO,
    kept: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `generator` and `discriminator`, which transformers loads without code of ours, into `output`.

    Of main's heads only that of replaced token detection goes along. kept: see `segments_of`. As `write_hf_folder`;
    raises UserError naming all that makes the run no ELECTRA, too.
    """
    refuse_other_folders(output)
    roles = electra_roles(model_config, objectives)
    refuse_other_tokenizer(tokenizer_folder, model_config)
    exported = hf_tensors(tensors, model_config, objectives)
    with whole_folder(output, tuple(CLASSES)) as folder:
        for role in roles:
            with torch.device("meta"):
                model = CLASSES[role](electra_config(model_config, role))
            model.save_pretrained(folder / role, state_dict={})  # all but weights
            write_weights(folder / role, electra_tensors(exported, model_config, role, kept), model)
            write_tokenizer(tokenizer_folder, folder / role, model_config.max_position_embeddings)
        facts = {**card, **(verify(folder) if verify else {})}
        for role in roles:
            (folder / role / "README.md").write_text(_card(role, facts, kept), encoding="utf-8")
        refuse_other_folders(output)  # again, as `whole_folder` does, which knows names alone


def refuse_other_folders(output: Path) -> None:
    """Raise UserError if output holds anything but what `write_electra_folders` wrote: other pairs have its names."""
    refuse_foreign(output, tuple(CLASSES))
    for role in CLASSES:
        folder, card = output / role, output / role / "README.md"
        refuse_foreign(folder, FILES)
        title = TITLE.format(role=role)
        is_ours = card.is_file() and title in card.read_text(encoding="utf-8", errors="replace").splitlines()
        if folder.exists() and not is_ours:
            raise UserError(
                f"{folder} is not by this tool, whose README.md has the line {title!r}; choose another folder"
            )


def _card(role: Role, facts: Mapping[str, object], kept: Mapping[str, Tensor] | None) -> str:
    segments = "segment 1 is that of the model it began with" if kept else "both rows of its segment embedding are 0"
    title, name = TITLE.format(role=role), CLASSES[role].__name__
    return CARD.format(title=title, name=name, facts=fact_tables(facts), segments=segments)


def electra_config(model_config: ModelConfig, role: Role) -> ElectraConfig:
    """transformers' configuration of one of the pair."""
    sizes, drops = model_config.main, True
    if role == "generator":
        sizes, drops = model_config.auxiliary, model_config.auxiliary_dropout != "zero"
    return ElectraConfig(
        architectures=[CLASSES[role].__name__],
        vocab_size=model_config.vocab_size,
        embedding_size=model_config.table_width,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.ffn_hidden_size,
        hidden_dropout_prob=model_config.hidden_dropout if drops else 0.0,
        attention_probs_dropout_prob=model_config.attention_dropout if drops else 0.0,
        max_position_embeddings=model_config.max_position_embeddings,
        initializer_range=model_config.init_method_std,
        layer_norm_eps=model_config.layer_norm_eps,
        type_vocab_size=SEGMENTS,
        pad_token_id=model_config.pad_token_id,
        bos_token_id=model_config.bos_token_id,
        eos_token_id=model_config.eos_token_id,
    )


def _our_name(name: str, role: Role) -> str:
    """Empty where we have no such tensor."""
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"electra\.encoder\.(layer\.\d+)\.(.+)", module)
    if layer:
        ours = f"{{encoder}}.encoder.{layer[1]}.{LAYER[layer[2]]}" if layer[2] in LAYER else ""
    else:
        ours = MODULES.get(module, "")
    return f"{ours.format(encoder=ENCODERS[role])}.{kind}" if ours else ""


def _architecture(config: PreTrainedConfig, role: Role) -> dict[str, Any]:
    sizes = EncoderSizes(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size
    )
    prefix = "auxiliary_" if role == "generator" else ""
    return {
        **FIXED,
        **({"rtd_head": "dense"} if role == "discriminator" else {}),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "embedding_size": config.embedding_size,
        "layer_norm_eps": config.layer_norm_eps,
        **{f"{prefix}{name}": value for name, value in vars(sizes).items()},
    }


def _differences(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Choices of transformers' ELECTRA that our encoders do not have."""
    ours = {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    }
    for name, value in ours.items():
        if config.get(name, value) != value:
            yield f"{folder}: {name} is {config[name]!r}, of ours {value!r}; give another model"
