"""The answer to a question is a span of a context, or is not there."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.answers import Answer, best_threshold, exact_match, scored_answers, word_f1
from metro_megatron.finetune.examples import ID, text_of
from metro_megatron.finetune.questions import Question, answers_of
from metro_megatron.finetune.tables import PLAIN, Layout, read_examples
from metro_megatron.finetune.task import Encoded, Outputs, Row, Task, parts
from metro_megatron.finetune.windows import WINDOW, WindowCollator, best_span, windows

_NOTHING = ("", -1e9)
"""What is found, and its score, where a context has no token."""


class Span(Task[list[Question]]):
    """Mean of the cross-entropies of an answer's first and last token; the first token of all stands for no answer."""

    name = "span"
    unit = "questions"
    makes = "reader"
    head = "question_answering"
    cut = "with a shortened question, in windows of {length} tokens"
    longest_row = WINDOW
    usage = 'transformers.AutoModelForQuestionAnswering.from_pretrained("{output}", trust_remote_code=True)'

    @property
    def score_names(self) -> tuple[str, ...]:
        return ("f1", "exact", "best_f1", "best_exact") if self.withholds else ("f1", "exact")

    @cached_property
    def withholds(self) -> bool:
        """Whether some questions have no answer: as in SQuAD 2.0, it may then give none, and its rules score it."""
        return any(one.answers == () for one in self.train)

    @staticmethod
    def read_examples(path: Path, layout: Layout = PLAIN, is_labelled: bool = True) -> list[Question]:
        """Answers are an object of lists `text` and `answer_start`, or a string and, if given, its first character."""
        texts, given = layout.text_columns or ["question", "context"], layout.label_columns
        if len(texts) != 2 or len(given) > 2:
            raise UserError(
                "span takes two text_columns, question and context, and one or two label_columns, the answer and its "
                f"first character; got {' '.join(texts)} and {' '.join(given) or 'none'}"
            )
        question, context = texts
        named = [tuple(given)] if given else [("answers",), ("answer", "answer_start"), ("answer",)]

        def read(row: dict[str, Any], columns: Sequence[str]) -> Question:
            text = text_of(row, context)
            answers, moved = answers_of(text, *(row.get(name) for name in columns[2:])) if is_labelled else (None, 0)
            return Question(text_of(row, question), text, answers, row.get(ID), moved)

        layouts = [(question, context, *one) for one in named] if is_labelled else [(question, context)]
        return read_examples(path, layouts, read, layout)

    def settings(self) -> dict[str, Any]:
        if not any(one.answers for one in self.train):
            raise UserError(f"none of {len(self.train)} training questions has an answer; span needs some")
        if not self.withholds and any(one.answers == () for one in self.validation):
            raise UserError("validation has questions without an answer, the training file has none; give it some")
        return {}

    def encode(self, tokenizer: PreTrainedTokenizerFast, examples: list[Question]) -> Encoded:
        """A row for every window of every context. Questions that are too long are cut, and counted."""
        rows, num_cut, length = [], 0, tokenizer.model_max_length
        for part in parts(len(examples)):
            for number, (found, is_cut) in enumerate(windows(tokenizer, examples[part], length), start=part.start):
                rows += [{**row, "question": number} for row in found]
                num_cut += is_cut
        return Encoded(rows, num_cut)

    def describe_labels(self) -> str:
        moved = sum(one.moved for one in (*self.train, *self.validation))
        elsewhere = f" ({moved} answers stand elsewhere than is said, the nearest place is taken)" if moved else ""
        return f"{sum(one.answers == () for one in self.train)} training questions without an answer{elsewhere}"

    def collator(self, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Row]], dict[str, Tensor]]:
        return WindowCollator(tokenizer)

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        found = self._answers(outputs, rows)
        golds = [[text for text, _ in one.answers or ()] for one in self.validation]
        if not self.withholds:
            pairs = list(zip([one.text for one in found], golds, strict=True))
            exact, f1 = ([exact_match(*pair) for pair in pairs], [word_f1(*pair, False) for pair in pairs])
            return {"f1": float(np.mean(f1)), "exact": float(np.mean(exact))}
        golds = [scored_answers(one) for one in golds]
        given = [self._given(one) for one in found]
        scores = {
            "f1": float(np.mean([word_f1(text, gold, True) for text, gold in zip(given, golds, strict=True)])),
            "exact": float(np.mean([exact_match(text, gold) for text, gold in zip(given, golds, strict=True)])),
        }
        has_answer = [bool(one.answers) for one in self.validation]
        for name, score in (("best_f1", lambda text, gold: word_f1(text, gold, True)), ("best_exact", exact_match)):
            each = [score(one.text, gold) for one, gold in zip(found, golds, strict=True)]
            best, threshold = best_threshold(each, found, has_answer)
            scores |= {name: best, f"{name}_threshold": threshold}
        return scores

    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        lines = []
        for one, found in zip(self.validation, self._answers(outputs, rows), strict=True):
            line: dict[str, Any] = {} if one.id is None else {ID: one.id}
            line |= {} if one.answers is None else {"label": [text for text, _ in one.answers]}
            line |= {"prediction": self._given(found)}
            lines.append(line | ({"answer": found.text, "no_answer_score": found.no_answer} if self.withholds else {}))
        return lines

    def remarks(self, outputs: Outputs, rows: Sequence[Row]) -> list[str]:
        found = []
        if self.withholds:
            threshold = self.scores(outputs, rows)["best_f1_threshold"]
            found.append(f"best_f1 is that of giving no answer where no_answer_score is above {threshold:.4f}")
        given = {self._given(one) for one in self._answers(outputs, rows)}
        if len(given) == 1 < len(self.validation):
            found.append(f"the model gives all questions the answer {given.pop()!r}")
        return found

    def _given(self, found: Answer) -> str:
        """With a threshold of 0 between an answer and none."""
        return "" if self.withholds and found.no_answer > 0 else found.text

    def _answers(self, outputs: Outputs, rows: Sequence[Row]) -> list[Answer]:
        best = [_NOTHING] * len(self.validation)
        none = [np.inf] * len(self.validation)
        for row, start, end in zip(rows, *outputs[:2], strict=True):
            number = row["question"]
            none[number] = min(none[number], float(start[0] + end[0]))
            span = best_span(start, end, row["p_mask"])
            if span and span[2] > best[number][1]:
                first, last, score = span
                text = self.validation[number].context[row["offsets"][first][0] : row["offsets"][last][1]]
                best[number] = (text.strip(), score)
        return [Answer(text, no - score) for (text, score), no in zip(best, none, strict=True)]
