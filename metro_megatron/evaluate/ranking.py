"""Candidates ranked by the heads that a pretrained model has, without training: sums of log-probabilities.

- clm, METRO's corrective head, reads the text as it stands, and says at every token of the candidate how likely it is
  the original one: one pass. It has never seen <mask>. The paper keeps this head for prompts (section 3.2).
- rtd, the detection head, reads it likewise: log p(original) of the candidate's tokens (ELECTRA as prompted by Xia et
  al., 2022).
- mlm, the auxiliary's head or that of a masked language model, fills one token of the candidate after the other, each
  alone behind <mask>: the pseudo-log-likelihood of Salazar et al. (2020), a pass for every token.

Only tokens of the candidate count: what stands around it is the same for all. Where candidates differ in length, their
means may be fairer than sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForMaskedLM,
    ElectraConfig,
    ElectraForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from metro_megatron.errors import UserError
from metro_megatron.evaluate.prompts import Filled, Prompt
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.folder import folder_config, folder_model, folder_tokenizer
from metro_megatron.hf.modeling_metro import (
    MetroForAuxiliaryMaskedLM,
    MetroForMaskedLM,
    MetroForReplacedTokenDetection,
)

HeadName: TypeAlias = Literal["clm", "rtd", "mlm"]
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Row:
    """One input of a model, and the tokens in it that are asked for."""

    owner: tuple[int, int]
    """Numbers of its prompt and its candidate."""
    ids: Tensor
    positions: Tensor
    targets: Tensor
    """The candidate's tokens at these positions."""


@dataclass(frozen=True)
class Head:
    """A model with one of its pretrained heads."""

    name: HeadName
    model: PreTrainedModel
    sign: float = 1.0
    """rtd: 1 where a positive logit means an original token, -1 where a replaced one."""

    def rows(self, owner: tuple[int, int], ids: Tensor, positions: Tensor, mask_id: int) -> Iterator[Row]:
        """What has to be read to score the tokens at positions [M] of ids [S]."""
        if self.name != "mlm":
            yield Row(owner, ids, positions, ids[positions])
            return
        for position in positions:
            yield Row(owner, ids.index_fill(0, position, mask_id), position[None], ids[position][None])

    def log_probabilities(self, logits: Tensor, row: Row) -> Tensor:
        """[M], of a row's logits [S, V], or [S] of rtd."""
        found = logits[row.positions.to(logits.device)].double()
        if self.name == "rtd":
            return functional.logsigmoid(self.sign * found)
        return found.log_softmax(-1).gather(1, row.targets.to(logits.device)[:, None])[:, 0]


@dataclass(frozen=True)
class Scorer:
    """The heads of a folder and its tokenizer."""

    heads: Sequence[Head]
    tokenizer: PreTrainedTokenizerFast
    longest: int
    """Tokens that the model can read."""

    def encode(self, filled: Filled) -> tuple[Tensor, Tensor]:
        """Ids [S] with specials, and the positions [M] of the tokens that have a character of the candidate."""
        found = self.tokenizer(
            filled.text, split_special_tokens=True, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        places = zip(found["offset_mapping"], found["special_tokens_mask"], strict=True)
        inside = [not special and begin < filled.end and end > filled.begin for (begin, end), special in places]
        return torch.tensor(found["input_ids"]), torch.tensor(inside).nonzero()[:, 0]

    def problems(self, prompts: Sequence[Prompt]) -> list[str]:
        """Items that are too long, and candidates that the tokenizer drops, by line."""
        long, dropped = [], []
        for prompt in prompts:
            encoded = [self.encode(prompt.filled(number)) for number in range(len(prompt.candidates))]
            length = max(len(ids) for ids, _ in encoded)
            if length > self.longest:
                long.append(f"line {prompt.line}: {length} tokens, the model reads {self.longest}")
            without = [
                one for one, (_, positions) in zip(prompt.candidates, encoded, strict=True) if not len(positions)
            ]
            if without:
                dropped.append(f"line {prompt.line}: the tokenizer has no token for the candidate {without[0]!r}")
        found = []
        for problems, remedy in (
            (long, "give shorter texts or fewer demonstrations"),
            (dropped, "give candidates of the tokenizer's characters"),
        ):
            more = [f"{len(problems)} such lines; {remedy}"] if problems else []
            found += problems[:_SHOWN_PROBLEMS] + more
        return found

    @torch.no_grad()
    def scores(
        self,
        head: Head,
        prompts: Sequence[Prompt],
        batch_size: int,
        average: bool,
        on_rows: Callable[[int], None] = lambda done: None,
    ) -> list[list[float]]:
        """Of every prompt's candidates: the sum of log-probabilities of their tokens, or with `average` the mean."""
        rows: list[Row] = []
        for item, prompt in enumerate(prompts):
            for number in range(len(prompt.candidates)):
                ids, positions = self.encode(prompt.filled(number))
                rows += head.rows((item, number), ids, positions, self.tokenizer.mask_token_id)
        sums = [[0.0] * len(prompt.candidates) for prompt in prompts]
        counts = [[0] * len(prompt.candidates) for prompt in prompts]
        head.model.eval()
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            for row, logits in zip(batch, self._logits(head.model, batch), strict=True):
                item, number = row.owner
                sums[item][number] += float(head.log_probabilities(logits, row).sum())
                counts[item][number] += len(row.positions)
            on_rows(begin + len(batch))
        if not average:
            return sums
        return [[s / n for s, n in zip(*pair, strict=True)] for pair in zip(sums, counts, strict=True)]

    def _logits(self, model: PreTrainedModel, batch: Sequence[Row]) -> Tensor:
        padding = self.tokenizer.pad_token_id
        ids = pad_sequence([row.ids for row in batch], batch_first=True, padding_value=padding)
        mask = pad_sequence([torch.ones_like(row.ids) for row in batch], batch_first=True)
        return model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits


def open_scorer(folder: Path, wanted: Sequence[HeadName] = ()) -> Scorer:
    """The heads of an export, of a masked language model or of ELECTRA's discriminator in transformers; all by default.

    Raises UserError for a folder that is none of them, and for heads that it does not have.
    """
    config = folder_config(folder)
    heads = list(_metro_heads(folder, config) if isinstance(config, MetroConfig) else _other_heads(folder, config))
    names = [head.name for head in heads]
    missing = [name for name in wanted if name not in names]
    if missing or not heads:
        has = f"has {', '.join(names)}" if names else "has no pretrained head that scores tokens"
        raise UserError(
            f"{folder}: {has}{f', not {missing[0]}' if missing else ''}; give a folder as it was pretrained"
        )
    tokenizer = folder_tokenizer(folder, config)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{folder}: its tokenizer has no tokenizer.json, which says where tokens stand in a text")
    if tokenizer.pad_token_id is None or tokenizer.mask_token_id is None:
        raise UserError(f"{folder}: its tokenizer lacks a padding or mask token; name both in tokenizer_config.json")
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))
    chosen = [head for head in heads if not wanted or head.name in wanted]
    return Scorer(sorted(chosen, key=lambda head: get_args(HeadName).index(head.name)), tokenizer, longest)


def _metro_heads(folder: Path, config: MetroConfig) -> Iterator[Head]:
    kinds: list[tuple[HeadName, type[PreTrainedModel]]] = []
    if "clm" in config.objectives:
        kinds.append(("clm", MetroForMaskedLM))
    if "rtd" in config.objectives:
        kinds.append(("rtd", MetroForReplacedTokenDetection))
    if config.num_auxiliary_layers:
        kinds.append(("mlm", MetroForAuxiliaryMaskedLM))
    elif "mlm" in config.objectives:
        kinds.append(("mlm", MetroForMaskedLM))
    for name, kind in kinds:
        if model := _whole(kind, folder):
            yield Head(name, model)


def _other_heads(folder: Path, config: PreTrainedConfig) -> Iterator[Head]:
    if isinstance(config, ElectraConfig) and (detector := _whole(ElectraForPreTraining, folder)):
        yield Head("rtd", detector, sign=-1.0)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and (filler := _whole(AutoModelForMaskedLM, folder)):
        yield Head("mlm", filler)


def _whole(kind: Any, folder: Path) -> PreTrainedModel | None:
    """The folder's model in FP32, or None where weights of its head would be drawn at random."""
    model, report = folder_model(kind, folder)
    return None if report["missing_keys"] else model
