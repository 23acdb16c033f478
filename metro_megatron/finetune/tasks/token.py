"""Every word of a text has a tag."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import ID, class_label, is_printed_list, one_column
from metro_megatron.finetune.metrics import are_chunk_tags, chunk_scores, classification_scores
from metro_megatron.finetune.names import id2label, look_alikes, ordered_names, unseen_names
from metro_megatron.finetune.tables import PLAIN, Layout, read_examples
from metro_megatron.finetune.task import Encoded, Outputs, Row, Task, parts

IGNORED = -100
"""The label of tokens that no loss is asked of: specials, and all but the first of a word."""
_SPAN_SCORES = ("span_f1", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class TaggedWords:
    """A text as words; tags are None in a file to be predicted."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    id: Any = field(default=None, compare=False)


class Token(Task[list[TaggedWords]]):
    """Cross-entropy at the first token of every word.

    Where tags mark spans (B-, I-, O), whole spans are scored as conlleval does it; else words.
    """

    name = "token"
    makes = "tagger of words"
    head = "token_classification"
    own_scores = ("accuracy", "macro_f1")
    usage = 'transformers.pipeline("token-classification", model="{output}", trust_remote_code=True)'

    @property
    def score_names(self) -> tuple[str, ...]:
        return _SPAN_SCORES if are_chunk_tags(self.names) else self.own_scores

    @staticmethod
    def read_examples(path: Path, layout: Layout = PLAIN, is_labelled: bool = True) -> list[TaggedWords]:
        """Words and tags are lists, or fields with white space between them."""
        words = one_column(layout.text_columns, "text_columns", "tokens")
        tags = one_column(layout.label_columns, "label_columns", "tags")

        def read(row: dict[str, Any], columns: Sequence[str]) -> TaggedWords:
            found = items(row, words)
            if not all(isinstance(word, str) for word in found):
                raise UserError(f"{words} holds what is not a string; write words as strings")
            if not is_labelled:
                return TaggedWords(found, None, row.get(ID))
            marks = tuple(map(class_label, items(row, tags)))
            if len(found) != len(marks):
                raise UserError(f"{words} has {len(found)} words, {tags} {len(marks)}; every word has one tag")
            return TaggedWords(found, marks, row.get(ID))

        return read_examples(path, [(words, tags) if is_labelled else (words,)], read, layout)

    @cached_property
    def names(self) -> list[str]:
        """The tags in the order of the logits. Raises UserError for those that cannot be learned."""
        train, validation = (
            [tag for one in examples for tag in one.tags or ()] for examples in (self.train, self.validation)
        )
        names = ordered_names(train)
        problems = look_alikes([*train, *validation]) + unseen_names(names, validation)
        if len(names) < 2:
            problems.append(f"all {len(train)} training words have the tag {names[0]!r}; token needs two")
        if problems:
            raise UserError(problems)
        return names

    def settings(self) -> dict[str, Any]:
        return id2label(self.names)

    def encode(self, tokenizer: PreTrainedTokenizerFast, examples: list[TaggedWords]) -> Encoded:
        """Words are joined by spaces and found again by what their tokens cover, whatever kind of tokenizer it is."""
        rows, num_cut = [], 0
        for part in parts(len(examples)):
            encoded = tokenizer(
                [" ".join(one.words) for one in examples[part]],
                truncation=True,
                split_special_tokens=True,
                return_attention_mask=False,
                return_offsets_mapping=True,
            )
            offsets = encoded.pop("offset_mapping")
            for i, one in enumerate(examples[part]):
                row = {name: values[i] for name, values in encoded.items()}
                rows.append(row | self._labels(one, offsets[i]))
            num_cut += sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
        return Encoded(rows, num_cut)

    def describe_labels(self) -> str:
        return f"{sum(len(one.words) for one in self.train)} training words with {len(self.names)} tags"

    def collator(self, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Row]], dict[str, Tensor]]:
        return DataCollatorForTokenClassification(tokenizer)

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        predicted, labels = self._predicted(outputs, rows), [one.tags or () for one in self.validation]
        flat = (np.array([self._number[tag] for tags in side for tag in tags]) for side in (predicted, labels))
        spans = chunk_scores(predicted, labels) if are_chunk_tags(self.names) else {}
        return {**spans, **classification_scores(*flat)}

    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        lines = []
        for one, predicted in zip(self.validation, self._predicted(outputs, rows), strict=True):
            line: dict[str, Any] = {} if one.id is None else {ID: one.id}
            line |= {"tokens": list(one.words)} | ({} if one.tags is None else {"label": list(one.tags)})
            lines.append({**line, "prediction": predicted})
        return lines

    def facts(self) -> dict[str, Any]:
        return {"labels": self.names, "majority_share": self._majority[1]}

    def remarks(self, outputs: Outputs, rows: Sequence[Row]) -> list[str]:
        name, share = self._majority
        found = [f"{name!r} for every validation word would have an accuracy of {share:.4f}"]
        predicted = {tag for tags in self._predicted(outputs, rows) for tag in tags}
        if len(predicted) == 1:
            found.append(f"the model gives all of them the tag {predicted.pop()!r}: it tells none apart")
        return found

    @property
    def _majority(self) -> tuple[str, float]:
        counts = Counter(tag for one in self.validation for tag in one.tags or ())
        ((name, count),) = counts.most_common(1)
        return name, count / counts.total()

    def _labels(self, one: TaggedWords, offsets: Sequence[tuple[int, int]]) -> Row:
        """The first token of every word, and the label of every token."""
        firsts = first_tokens(one.words, offsets)
        if one.tags is None:
            return {"firsts": firsts}
        labels = [IGNORED] * len(offsets)
        for position, tag in zip(firsts, one.tags, strict=True):
            if position is not None and labels[position] == IGNORED:
                labels[position] = self._number[tag]
        return {"firsts": firsts, "labels": labels}

    @cached_property
    def _number(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def _predicted(self, outputs: Outputs, rows: Sequence[Row]) -> list[list[str]]:
        """A tag for every word; words that were cut off, or have no token, get the training file's most frequent."""
        ((unread, _),) = Counter(tag for one in self.train for tag in one.tags or ()).most_common(1)
        return [
            [unread if first is None else self.names[logits[first].argmax()] for first in row["firsts"]]
            for logits, row in zip(outputs[0], rows, strict=True)
        ]


def items(row: dict[str, Any], name: str) -> tuple[Any, ...]:
    """The items of a list, or of a field with white space between them. Raises UserError."""
    value = row.get(name)
    if isinstance(value, str) and is_printed_list(value):
        raise UserError(f"{name} is {value!r}, a printed list; write words with spaces between them, or JSONL")
    found = value.split() if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not found:
        raise UserError(f"{name} is {value!r}, must be a list, or words with spaces between them")
    return tuple(found)


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """For every word the first token that covers a character of it, in the text of words joined by spaces.

    offsets: first character and character after the last of every token, (0, 0) for specials. None for a word that has
    no token: it was cut off, or the tokenizer drops its characters.
    """
    found: list[int | None] = []
    begin, position = 0, 0
    for word in words:
        end = begin + len(word)
        while position < len(offsets) and (offsets[position][1] <= begin or offsets[position] == (0, 0)):
            position += 1
        covers = position < len(offsets) and offsets[position][0] < end
        found.append(position if covers else None)
        begin = end + 1
    return found
