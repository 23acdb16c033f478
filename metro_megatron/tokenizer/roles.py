"""Which tokens of any tokenizer begin and end a sample, pad it, and hide a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from metro_megatron.errors import UserError
from metro_megatron.tokenizer.tokenizer import BYTE, CONFIG_FILE
from metro_megatron.vocabulary import SpecialIds


class Role(NamedTuple):
    """What a token is for."""

    name: str
    """For messages."""
    settings: tuple[str, ...]
    """The names that transformers has for it, the first one that is there counts."""
    usual: tuple[str, ...]
    """How it is written where no file says it: in BERT's family and in RoBERTa's."""


ROLES = {
    "bos": Role("begin", ("cls_token", "bos_token"), ("[CLS]", "<s>", "<cls>", "<bos>")),
    "pad": Role("padding", ("pad_token",), ("[PAD]", "<pad>")),
    "eos": Role("end", ("sep_token", "eos_token"), ("[SEP]", "</s>", "<sep>", "<eos>")),
    "mask": Role("mask", ("mask_token",), ("[MASK]", "<mask>")),
}
UNKNOWN = Role("unknown", ("unk_token",), ("[UNK]", "<unk>"))


def stored_settings(folder: Path) -> dict[str, Any]:
    """What the files beside a tokenizer.json say of its tokens. Raises UserError for a damaged one."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG_FILE):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise TypeError("no object")
            found |= content
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); give another copy of the tokenizer") from error
    return found


def tokens_of_roles(
    pipeline: tokenizers.Tokenizer, settings: Mapping[str, Any], folder: Path
) -> tuple[dict[str, str], str | None]:
    """The token of each of ROLES, and that of unknown words, if there is one.

    Raises UserError naming all roles that no token has, or that share one which must be apart.
    """
    found = {name: _token(pipeline, settings, role) for name, role in ROLES.items()}
    missing = [name for name, token in found.items() if token is None]
    problems = []
    if missing:
        what = ", ".join(f"{ROLES[name].name} token ({' or '.join(ROLES[name].usual[:2])})" for name in missing)
        problems.append(
            f"{folder}: the tokenizer has no {what}, which pretraining needs; add it with add_special_tokens and "
            "save_pretrained of transformers, or take a tokenizer of tools/train_tokenizer.py"
        )
    tokens = {name: token for name, token in found.items() if token is not None}
    for name in ("mask", "pad"):
        same = [ROLES[other].name for other, token in tokens.items() if other != name and token == tokens.get(name)]
        if same:
            problems.append(
                f"{folder}: {tokens[name]} is the {ROLES[name].name} token and the {same[0]} token, and cannot be "
                f"told apart in a text; give the tokenizer a {ROLES[name].settings[0]} of its own"
            )
    if problems:
        raise UserError(problems)
    return tokens, _token(pipeline, settings, UNKNOWN)


def special_ids_of(pipeline: tokenizers.Tokenizer, tokens: Mapping[str, str], unknown: str | None) -> SpecialIds:
    """Ids of the tokens of ROLES; of unknown words, of what else the tokenizer calls special, and of no token at all.

    Ids that no token has are counted below the largest that has one. Bytes that spell what no piece holds are text,
    also where they were trained as special tokens. Raises UserError where a word has the id of one of ROLES, as adding
    tokens to a vocabulary with gaps leaves it.
    """
    ids = {name: id_of(pipeline, token) for name, token in tokens.items()}
    vocabulary = pipeline.get_vocab(with_added_tokens=True)
    shared = [token for token, number in vocabulary.items() if number in ids.values() and token not in tokens.values()]
    if shared:
        number = vocabulary[min(shared)]
        raise UserError(
            f"the tokenizer has {pipeline.id_to_token(number)} and {min(shared)} as id {number}, so that text cannot "
            "be told from it; give its special tokens ids of their own"
        )
    used = set(vocabulary.values())
    others = set(range(max(used) + 1)) - used
    has_bytes = getattr(pipeline.model, "byte_fallback", False)
    special = {number: one.content for number, one in pipeline.get_added_tokens_decoder().items() if one.special}
    others |= {number for number, content in special.items() if not (has_bytes and BYTE.fullmatch(content))}
    others |= {id_of(pipeline, unknown)} if unknown is not None else set()
    return SpecialIds(**ids, others=tuple(sorted(others - set(ids.values()))))


def id_of(pipeline: tokenizers.Tokenizer, token: str) -> int:
    """Of a token that is in the vocabulary."""
    found = pipeline.token_to_id(token)
    assert found is not None
    return found


def _token(pipeline: tokenizers.Tokenizer, settings: Mapping[str, Any], role: Role) -> str | None:
    """The first that is in the vocabulary."""
    stored = (settings.get(name) for name in role.settings)
    candidates = (one.get("content") if isinstance(one, dict) else one for one in stored)
    for token in (*candidates, *role.usual):
        if isinstance(token, str) and pipeline.token_to_id(token) is not None:
            return token
    return None
