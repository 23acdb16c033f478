"""COCO-LM's checkpoints of fairseq (github.com/microsoft/COCO-LM), auxiliary and main, as our pair.

A file is what torch.save made of {"model": tensors, "args" or "cfg": options}; dict.txt beside it says which token each
row of the vocabulary is. Query, key and value stand below each other in one matrix there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from metro_megatron.errors import UserError
from metro_megatron.hf.pretrained import Pretrained
from metro_megatron.hf.stored import LazyTensors, read_torch_file
from metro_megatron.hf.weights import QKV
from metro_megatron.vocabulary import SPECIAL_TOKENS

ENCODERS = {"encoder": "metro", "auxiliary": "auxiliary"}
"""Ours by theirs."""
MODULES = {
    "sentence_encoder.embed_tokens": "{encoder}.embeddings.word_embeddings",
    "sentence_encoder.embed_positions": "{encoder}.embeddings.position_embeddings",
    "sentence_encoder.emb_layer_norm": "{encoder}.embeddings.norm",
    "sentence_encoder.relative_attention_bias": "{encoder}.encoder.relative_attention_bias",
    "binary_head.out_proj": "rtd_head",
    "lm_head": "{head}.decoder",
    "lm_head.dense": "{head}.dense",
    "lm_head.layer_norm": "{head}.norm",
    "seq_head.dense": "scl_head.dense",
    "seq_head.layer_norm": "scl_head.norm",
}
"""Our modules by theirs below an encoder; {head} is that encoder's language modelling head."""
LAYER = {
    "self_attn.out_proj": "attention.output",
    "self_attn_layer_norm": "attention_norm",
    "fc1": "intermediate",
    "fc2": "output",
    "final_layer_norm": "output_norm",
}
"""Inside sentence_encoder.layers.N and {encoder}.encoder.layer.N."""
WORDS = "encoder.sentence_encoder.embed_tokens.weight"
IN_PROJ = "self_attn.in_proj"
FINETUNED = "classification_heads."
SPECIALS = dict(zip(("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"), SPECIAL_TOKENS, strict=True))
"""Of its dictionary, and the names that `Pretrained.vocabulary` has for them: ids 0 to 3, and the last one."""
LAYER_NORM_EPS = 1e-5
MAX_DISTANCE = 128
"""The model's default of max_rel_pos."""


def open_cocolm(path: Path) -> Pretrained:
    """Raises UserError for another file, an architecture that is not COCO-LM's, and without dict.txt."""
    content = read_torch_file(path)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or WORDS not in state:
        raise UserError(f"{path}: no checkpoint of COCO-LM, which has encoder.sentence_encoder; give its model.pt")
    options = _options(content)
    tensors: dict[str, Callable[[], Tensor]] = {}
    unread, problems = [], list(_differences(path, options))
    for name, tensor in state.items():
        makers = _ours(name, tensor)
        tensors |= makers
        if not makers and name.startswith(FINETUNED):
            unread.append(name)
        elif not makers:
            problems.append(f"{path}: {name} is no part of COCO-LM's model; give a checkpoint of its own code")
    vocabulary, rows = _vocabulary(path.with_name("dict.txt")), len(state[WORDS])
    if len(vocabulary) != rows:
        problems.append(f"{path}: {rows} rows of the vocabulary, dict.txt makes {len(vocabulary)}; give its own one")
    if problems:
        raise UserError(problems)
    architecture = _architecture(state, options)
    return Pretrained(path, LazyTensors(tensors), architecture, None, vocabulary=vocabulary, unread=unread)


def _ours(name: str, tensor: Tensor) -> dict[str, Callable[[], Tensor]]:
    """By our names; none where we have no such tensor."""
    there, _, rest = name.partition(".")
    module, _, kind = rest.rpartition(".")
    encoder = ENCODERS.get(there)
    if encoder is None:
        return {}
    layer = re.fullmatch(r"sentence_encoder\.layers\.(\d+)\.(.+)", module)
    if layer and layer[2] == IN_PROJ:
        parts = tensor.chunk(len(QKV))
        names = [f"{encoder}.encoder.layer.{layer[1]}.attention.{part}.{kind}" for part in QKV]
        return {one: partial(part.clone) for one, part in zip(names, parts, strict=True)}
    if layer:
        ours = f"{{encoder}}.encoder.layer.{layer[1]}.{LAYER[layer[2]]}" if layer[2] in LAYER else ""
    else:
        ours = MODULES.get(module, "")
    if not ours:
        return {}
    head = "clm_head" if encoder == "metro" else "auxiliary_head"
    return {f"{ours.format(encoder=encoder, head=head)}.{kind}": lambda: tensor}


def _options(content: Mapping[str, Any]) -> dict[str, Any]:
    """Of the model: args of fairseq before 1.0, cfg.model of later ones."""
    found = content.get("args")
    if found is None:
        found = (content.get("cfg") or {}).get("model")
    return dict(vars(found) if isinstance(found, argparse.Namespace) else found or {})


def _differences(path: Path, options: Mapping[str, Any]) -> Iterator[str]:
    """Choices of its code that our encoders do not have, and a number that no tensor shows."""
    for name, ours in (("activation_fn", "gelu"), ("encoder_normalize_before", False)):
        if options.get(name, ours) != ours:
            yield f"{path}: {name} is {options[name]!r}, of ours {ours!r}; give another checkpoint"
    if not options.get("rel_pos", 1) and "encoder_attention_heads" not in options:
        yield f"{path}: nothing says how many heads it has; give a checkpoint with its args"


def _architecture(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """From the tensors, but for what no tensor shows."""
    main, auxiliary = (_sizes(state, encoder, options) for encoder in ENCODERS)
    bias = state.get("encoder.sentence_encoder.relative_attention_bias.weight")
    buckets: dict[str, Any] = {"relative_bucket": "none"}
    if bias is not None:
        buckets = {
            "relative_bucket": "coco",
            "relative_attention_num_buckets": len(bias),
            "relative_attention_max_distance": options.get("max_rel_pos", MAX_DISTANCE),
        }
    return {
        **main,
        **{f"auxiliary_{name}": value for name, value in auxiliary.items()},
        **buckets,
        "embedding_size": main["hidden_size"],
        "max_position_embeddings": len(state["encoder.sentence_encoder.embed_positions.weight"]),
        "layer_norm_eps": LAYER_NORM_EPS,
        "reset_cls": False,
        "untied_positions": False,
        "norm_first": False,
        "rtd_head": "linear",
        "lm_head": "linear",
    }


def _sizes(state: Mapping[str, Tensor], encoder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of an encoder; nothing where the file has none."""
    prefix = f"{encoder}.sentence_encoder"
    layers = {name.split(".")[3] for name in state if name.startswith(f"{prefix}.layers.")}
    if not layers:
        return {}
    inner, hidden = state[f"{prefix}.layers.0.fc1.weight"].shape
    bias = state.get(f"{prefix}.relative_attention_bias.weight")
    heads = bias.size(1) if bias is not None else options["encoder_attention_heads"]
    return {
        "num_layers": len(layers), "hidden_size": hidden, "num_attention_heads": heads, "ffn_hidden_size": inner
    }  # fmt: skip


def _vocabulary(path: Path) -> list[str]:
    """Token of every row: specials, the lines of dict.txt ("token count"), and the mask."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable ({error}); put COCO-LM's dictionary beside the checkpoint") from error
    words = [line.rstrip("\r").rsplit(" ", 1)[0] for line in lines if line]  # a token may be another line end
    named = [*list(SPECIALS)[:-1], *words, list(SPECIALS)[-1]]
    return list(dict.fromkeys(SPECIALS.get(word, word) for word in named))
