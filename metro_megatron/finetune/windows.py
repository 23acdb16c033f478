"""A question with each of the windows that its context is cut into, and the answer in them.

A tokenizer encodes the pair as a whole, so that it may have any rule for pairs; the windows are cut from what it gives,
each behind all that stands before the context (specials, the question) and before what stands behind it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from metro_megatron.finetune.questions import Question
from metro_megatron.finetune.task import Row

WINDOW = 384
"""Tokens of a row, question, window and specials, unless asked for others (METRO does not say; COCO-LM's)."""
STRIDE = 128
"""Tokens from the beginning of a window to that of the next, at most half a window."""
MAX_QUESTION = 64
"""Tokens of a question, at most half of what specials leave of a row."""
MAX_ANSWER = 30
"""Tokens of an answer."""
N_BEST = 20
"""Beginnings and ends that are tried in a window."""
_MOST_SPECIALS = 4
"""RoBERTa's for a pair."""


def windows(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question], length: int
) -> Iterator[tuple[list[Row], bool]]:
    """The rows, of up to `length` tokens, of every question, and whether it was cut.

    Rows hold the model's inputs, `p_mask` [S] (1 where no answer may be: question and specials but for the first
    token, which stands for none), `offsets` [S, 2] (characters of the context) and, of a question with known answers,
    `start_positions` and `end_positions`, 0 where the window does not hold the first answer whole.
    """
    encoded = tokenizer(
        [one.question for one in questions],
        [one.context for one in questions],
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,  # about their length
    )
    all_offsets = encoded.pop("offset_mapping")
    for i, question in enumerate(questions):
        columns = {name: np.array(values[i], dtype=np.int32) for name, values in encoded.items()}
        part = np.array([-1 if one is None else one for one in encoded.sequence_ids(i)])
        offsets = np.array(all_offsets[i], dtype=np.int32).reshape(-1, 2)
        answer = answer_tokens(question, offsets, part)
        rows = []
        for tokens in _windows(part, length):
            row = {name: values[tokens] for name, values in columns.items()}
            p_mask = (part[tokens] != 1).astype(np.int8)
            p_mask[0] = 0
            row |= {"p_mask": p_mask, "offsets": offsets[tokens]}
            rows.append(row | ({} if question.answers is None else _positions(tokens, answer)))
        yield rows, bool((part == 0).sum() > _question_tokens(length))


def answer_tokens(question: Question, offsets: NDArray[np.int32], part: NDArray[np.int_]) -> tuple[int, int] | None:
    """First and last token of the first answer: those of the context that cover its first and last character."""
    if not question.answers:
        return None
    text, begin = question.answers[0]
    end = begin + len(text.rstrip())
    begin += len(text) - len(text.lstrip())
    covers = (part == 1) & (offsets[:, 0] < end) & (offsets[:, 1] > begin)
    tokens = covers.nonzero()[0]
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else None


def best_span(
    start: NDArray[np.floating], end: NDArray[np.floating], p_mask: NDArray[np.int8]
) -> tuple[int, int, float] | None:
    """First and last token and score of the best span, of the N_BEST best beginnings and ends; None without context."""
    allowed = (p_mask == 0).nonzero()[0][1:]
    if not len(allowed):
        return None
    first = allowed[np.argsort(-start[allowed], kind="stable")[:N_BEST]]
    last = allowed[np.argsort(-end[allowed], kind="stable")[:N_BEST]]
    length = last[None] - first[:, None] + 1
    scores = np.where((length > 0) & (length <= MAX_ANSWER), start[first][:, None] + end[last][None], -np.inf)
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return (int(first[i]), int(last[j]), float(scores[i, j])) if np.isfinite(scores[i, j]) else None


@dataclass(frozen=True)
class WindowCollator:
    """Pads what the model reads by its tokenizer, and p_mask, where the model takes it, with 1."""

    tokenizer: PreTrainedTokenizerFast

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        names = [name for name in self.tokenizer.model_input_names if name in rows[0]]
        inputs = [{name: row[name].tolist() for name in names} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))
        if "p_mask" in rows[0]:
            batch["p_mask"] = torch.ones_like(batch["input_ids"])
            for i, row in enumerate(rows):
                batch["p_mask"][i, : len(row["p_mask"])] = torch.from_numpy(row["p_mask"])
        for name in ("start_positions", "end_positions"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def _question_tokens(length: int) -> int:
    return min(MAX_QUESTION, (length - _MOST_SPECIALS) // 2)


def _windows(part: NDArray[np.int_], length: int) -> Iterator[NDArray[np.int_]]:
    """The tokens of every window; part: 0 for tokens of the question, 1 for those of the context, -1 for specials."""
    context = (part == 1).nonzero()[0]
    dropped = (part == 0).nonzero()[0][_question_tokens(length) :]
    rest = np.setdiff1d(np.arange(len(part)), np.concatenate([context, dropped]))
    if not len(context):
        yield rest
        return
    before, after = rest[rest < context[0]], rest[rest > context[-1]]
    room = length - len(rest)
    begin = 0
    while True:
        window = context[begin : begin + room]
        yield np.concatenate([before, window, after])
        if begin + len(window) == len(context):
            return
        begin += min(STRIDE, (room + 1) // 2)


def _positions(tokens: NDArray[np.int_], answer: tuple[int, int] | None) -> dict[str, int]:
    places = [np.flatnonzero(tokens == one) for one in answer or (-1, -1)]
    first, last = (int(place[0]) if len(place) else 0 for place in places)
    first, last = (first, last) if first and last else (0, 0)
    return {"start_positions": first, "end_positions": last}
