"""The frame carries a task of another kind: windows of a text, inputs of its own, two outputs, answers as spans."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.run import finetune
from metro_megatron.finetune.tables import PLAIN, Layout, read_examples
from metro_megatron.finetune.task import Encoded, Outputs, Row, Task

FILLERS = {"input_ids": 1, "p_mask": 1}


@dataclass(frozen=True)
class Question:
    question: str
    context: str
    answer: str


class Spans(Task[list[Question]]):
    """Where in a context the answer stands; a context is cut into windows that overlap."""

    name = "spans"
    unit = "questions"
    makes = "reader"
    head = "question_answering"
    score_names = ("exact",)
    usage = "MetroForQuestionAnswering"

    @staticmethod
    def read_examples(path: Path, layout: Layout = PLAIN, is_labelled: bool = True) -> list[Question]:
        columns = ("question", "context", "answer")
        return read_examples(path, [columns], lambda row, _: Question(*(row[name] for name in columns)))

    def settings(self) -> dict[str, Any]:
        return {}

    def encode(self, tokenizer: PreTrainedTokenizerFast, examples: list[Question]) -> Encoded:
        encoded = tokenizer(
            [one.question for one in examples],
            [one.context for one in examples],
            truncation="only_second",
            stride=4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows = []
        for i, ids in enumerate(encoded["input_ids"]):
            number = encoded["overflow_to_sample_mapping"][i]
            p_mask = [int(part != 1) for part in encoded.sequence_ids(i)]
            first = examples[number].context.index(examples[number].answer)
            inside = [
                position
                for position, (start, end) in enumerate(encoded["offset_mapping"][i])
                if not p_mask[position] and first <= end - 1 and start < first + len(examples[number].answer)
            ]
            row = {"input_ids": ids, "p_mask": p_mask, "offsets": encoded["offset_mapping"][i], "question": number}
            rows.append({**row, "start_positions": min(inside, default=0), "end_positions": max(inside, default=0)})
        return Encoded(rows, 0)

    def describe_labels(self) -> str:
        return "answers in their contexts"

    def collator(self, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Row]], dict[str, Tensor]]:
        def collate(rows: list[Row]) -> dict[str, Tensor]:
            assert rows[0].keys() == {*FILLERS, "start_positions", "end_positions"}
            batch = {
                name: pad_sequence([torch.tensor(row[name]) for row in rows], True, filler)
                for name, filler in FILLERS.items()
            }
            positions = {name: torch.tensor([row[name] for row in rows]) for name in rows[0] if name not in FILLERS}
            return {**batch, **positions, "attention_mask": (batch["input_ids"] != FILLERS["input_ids"]).long()}

        return collate

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        lines = self.predictions(outputs, rows)
        return {"exact": sum(line["label"] == line["prediction"] for line in lines) / len(lines)}

    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        best = [(float("-inf"), "")] * len(self.validation)
        for row, start, end in zip(rows, *outputs, strict=True):
            length = len(row["input_ids"])
            first = int(start[1:length].argmax()) + 1
            last = int(end[first:length].argmax()) + first
            text = self.validation[row["question"]].context[row["offsets"][first][0] : row["offsets"][last][1]]
            best[row["question"]] = max(best[row["question"]], (float(start[first] + end[last]), text.strip()))
        pairs = zip(self.validation, best, strict=True)
        return [{"label": one.answer, "prediction": text} for one, (_, text) in pairs]


def write(path: Path, count: int) -> Path:
    words = ["the old house", "a green bird", "the river", "a cat", "the good dog"]
    with path.open("w") as file:
        for i in range(count):
            answer = ("good", "bad")[i % 2]
            # The last words lie in another window than the first.
            context = " ".join([*(words[(i + j) % 5] for j in range(3 * (i % 3))), answer, words[i % 5]])
            file.write(json.dumps({"question": "a cat", "context": context, "answer": answer}) + "\n")
    return path


def test_windows_own_inputs_and_several_outputs(export_folder: Path, tmp_path: Path) -> None:
    task = Spans(*(Spans.read_examples(write(tmp_path / f"{count}.jsonl", count)) for count in (120, 18)))
    recipe = Recipe(
        learning_rate=5e-3, batch_size=16, epochs=4, warmup_steps=5, max_length=24, device="cpu", from_scratch=True
    )
    result = finetune(task, export_folder, tmp_path / "out", recipe)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [one.answer for one in task.validation]
    assert result["exact"] == sum(line["label"] == line["prediction"] for line in lines) / 18
    assert all(line["prediction"] in one.context for line, one in zip(lines, task.validation, strict=True))
    assert result["exact"] > 0.5, lines
