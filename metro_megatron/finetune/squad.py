"""SQuAD 1.1 and 2.0 from their own JSON."""

import json
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.finetune.benchmark import Benchmark, Part
from metro_megatron.finetune.questions import Question, answers_of
from metro_megatron.finetune.tasks.span import Span
from metro_megatron.text.rows import text_file


def read_squad(path: Path) -> list[Question]:
    """All questions of a file. Raises UserError, for questions by their id."""
    with text_file(path) as file:
        text = file.read()
    try:
        articles = json.loads(text)["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        pairs = [(paragraph["context"], line) for paragraph in paragraphs for line in paragraph["qas"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: has not the form of SQuAD's files ({type(error).__name__}: {error})") from error
    if not pairs:
        raise UserError(f"{path}: holds no questions")
    found: list[Question] = []
    problems: list[str] = []
    for context, line in pairs:
        try:
            found.append(_question(context, line))
        except UserError as error:
            name = line.get("id") if isinstance(line, dict) else len(found) + len(problems) + 1
            problems.append(f"{path}, question {name}: {error}")
    if problems:
        raise UserError(problems[:5] + [f"{path}: {len(problems)} such questions of {len(pairs)}"])
    return found


def _question(context: Any, line: Any) -> Question:
    if not isinstance(line, dict) or not isinstance(line.get("question"), str):
        raise UserError("has no question")
    if not isinstance(context, str):
        raise UserError(f"context is {context!r}, must be a string")
    is_impossible = line.get("is_impossible", False)
    if not isinstance(is_impossible, bool):
        raise UserError(f"is_impossible is {is_impossible!r}, must be true or false")
    if "answers" not in line and not is_impossible:
        return Question(line["question"], context, None, line.get("id"))
    answers, moved = answers_of(context, [] if is_impossible else line["answers"])
    return Question(line["question"], context, answers, line.get("id"), moved)


def _task(version: str, scores: tuple[str, ...]) -> Benchmark:
    train, validation = (Part((f"{split}-v{version}.json",), read_squad) for split in ("train", "dev"))
    return Benchmark("", Span, scores, train, validation)


SQUAD = {
    "squad": _task("1.1", ("f1", "exact")),
    "squad2": _task("2.0", ("f1", "exact", "best_f1", "best_exact")),
}
"""By the name of the task on the command line."""
