"""Answers are found by what tokens cover, and windows lose nothing, whatever the tokenizer."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.lesson import Lesson
from metro_megatron.finetune.questions import Question, answers_of
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.tasks.span import Span
from metro_megatron.finetune.windows import MAX_ANSWER, MAX_QUESTION, STRIDE, WINDOW, WindowCollator, best_span, windows
from tests.finetune.encoders import KINDS, TEXTS, tokenizer_of

CONTEXT = " ".join(TEXTS)
ANSWERS = (
    "cat",
    "The cat's house",
    "1895",
    "1943) was old",
    "Zoë naïvely",
    "東京",
    "“good”",
    "so it was good",
    " in the ",
)


def question(context: str, *answers: str, text: str = "where was the cat?") -> Question:
    return Question(text, context, tuple((answer, context.index(answer)) for answer in answers))


def bare(text: str) -> str:
    """As BERT's normalizer leaves it, without spaces."""
    letters = unicodedata.normalize("NFD", text.lower())
    return "".join(one for one in letters if not one.isspace() and unicodedata.category(one) != "Mn")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return tokenizer_of(request.param)


def test_the_tokens_of_an_answer_spell_it(tokenizer: PreTrainedTokenizerFast) -> None:
    for answer in ANSWERS:
        (((row,), is_cut),) = windows(tokenizer, [question(CONTEXT, answer)], 1000)
        assert not is_cut
        first, last = row["start_positions"], row["end_positions"]
        spelled = tokenizer.decode(row["input_ids"][first : last + 1])
        assert bare(spelled) == bare(answer)
        whole = tokenizer("where was the cat?", CONTEXT, split_special_tokens=True)
        assert row["input_ids"].tolist() == whole["input_ids"]
        assert row.get("token_type_ids", np.array([])).tolist() == whole.get("token_type_ids", [])


def test_windows_hold_every_token_and_begin_a_stride_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    context = " ".join([*[CONTEXT] * 5, "here is 東京.", *[CONTEXT] * 5])
    long_question = " ".join(["the"] * 100)
    asked = Question(long_question, context, (("here is 東京", context.index("here is")),))
    ((rows, is_cut),) = windows(tokenizer, [asked], WINDOW)
    assert is_cut
    whole = tokenizer(long_question, context, split_special_tokens=True, return_offsets_mapping=True)
    tokens = [i for i, part in enumerate(whole.sequence_ids(0)) if part == 1]
    room = WINDOW - MAX_QUESTION - (len(whole["input_ids"]) - len(tokens) - sum(p == 0 for p in whole.sequence_ids(0)))
    seen = set()
    for number, row in enumerate(rows):
        inside = np.flatnonzero(row["p_mask"] == 0)[1:]
        assert len(row["input_ids"]) == WINDOW or row is rows[-1]
        assert (row["p_mask"][1:] == 0).sum() == len(inside) and row["p_mask"][0] == 0
        own = tokens[number * STRIDE : number * STRIDE + room]
        seen.update(own)
        assert row["input_ids"][inside].tolist() == [whole["input_ids"][i] for i in own]
        assert row["offsets"][inside].tolist() == [list(whole["offset_mapping"][i]) for i in own]
        assert row["input_ids"][1 : MAX_QUESTION + 1].tolist() == whole["input_ids"][1 : MAX_QUESTION + 1]
        if row["start_positions"]:
            first, last = (row["offsets"][row[f"{side}_positions"]] for side in ("start", "end"))
            assert context[first[0] : last[1]].strip() == "here is 東京"
        else:
            assert row["end_positions"] == 0
    assert seen == set(tokens)
    assert 1 < sum(row["start_positions"] > 0 for row in rows) < len(rows)


def test_short_models_have_overlapping_windows_too(tokenizer: PreTrainedTokenizerFast) -> None:
    ((rows, _),) = windows(tokenizer, [question(CONTEXT * 3, "old")], 40)
    assert all(len(row["input_ids"]) <= 40 for row in rows)
    for before, after in zip(rows, rows[1:], strict=False):
        assert before["offsets"][before["p_mask"] == 0][-1][1] > after["offsets"][after["p_mask"] == 0][1][0]


@pytest.mark.parametrize("length", [8, 9, 12, 500])
def test_windows_are_as_long_as_asked_and_leave_room_for_the_context(
    tokenizer: PreTrainedTokenizerFast, length: int
) -> None:
    context = CONTEXT if length < 100 else CONTEXT * 20
    ((rows, _),) = windows(tokenizer, [question(context, "old", text=CONTEXT)], length)
    lengths = [len(row["input_ids"]) for row in rows]
    assert set(lengths[:-1]) == {length} and 0 < lengths[-1] <= length
    places = [offset for row in rows for offset in row["offsets"][row["p_mask"] == 0][1:].tolist()]
    whole = tokenizer(CONTEXT, context, split_special_tokens=True, return_offsets_mapping=True)
    own = [offset for offset, part in zip(whole["offset_mapping"], whole.sequence_ids(0), strict=True) if part == 1]
    assert {tuple(place) for place in places} == set(own)


def test_nothing_to_find(tokenizer: PreTrainedTokenizerFast) -> None:
    unknown, impossible, empty = Question("a?", "cat", None), Question("a?", "cat", ()), Question("a?", "", ())
    found = [rows for rows, _ in windows(tokenizer, [unknown, impossible, empty], 64)]
    assert "start_positions" not in found[0][0]
    assert (found[1][0]["start_positions"], found[1][0]["end_positions"]) == (0, 0)
    assert len(found[2]) == 1
    assert best_span(np.zeros(9), np.zeros(9), found[2][0]["p_mask"]) is None


def test_a_batch_is_what_the_tokenizer_pads_and_p_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [rows[0] for rows, _ in windows(tokenizer, [question("a cat", "cat"), question(CONTEXT, "old")], WINDOW)]
    batch = WindowCollator(tokenizer)(rows)
    padded = tokenizer(["where was the cat?"] * 2, ["a cat", CONTEXT], padding=True, return_tensors="pt")
    for name, values in padded.items():
        assert torch.equal(batch.pop(name), values)
    length = len(rows[0]["p_mask"])
    assert batch["p_mask"][0].tolist() == rows[0]["p_mask"].tolist() + [1] * (len(rows[1]["p_mask"]) - length)
    assert batch["start_positions"].tolist() == [row["start_positions"] for row in rows]


def test_the_best_span_is_that_of_trying_all() -> None:
    generator = np.random.default_rng(0)
    p_mask = np.array([0, 1, 1, *[0] * 50, 1])
    for _ in range(20):
        start, end = generator.normal(size=(2, 54))
        spans = {(i, j): start[i] + end[j] for i in range(3, 53) for j in range(i, min(53, i + MAX_ANSWER)) if i and j}
        best = max(spans, key=spans.__getitem__)
        first, last, score = best_span(start, end, p_mask)
        assert (first, last) == best and score == pytest.approx(spans[best])


def test_where_answers_stand_is_read_in_every_form() -> None:
    context = "old cat, old dog"
    assert answers_of(context, "old", 9) == ((("old", 9),), 0)
    assert answers_of(context, "old") == ((("old", 0),), 0)
    assert answers_of(context, {"text": ["old", "dog"], "answer_start": [9, 13]}) == ((("old", 9), ("dog", 13)), 0)
    assert answers_of(context, [{"text": "cat", "answer_start": 4}]) == ((("cat", 4),), 0)
    for nothing in (None, "", " ", [], {"text": [], "answer_start": []}):
        assert answers_of(context, nothing) == ((), 0)
    # Beside where it should be: the nearest.
    assert answers_of(context, "old", 8) == ((("old", 9),), 1)
    assert answers_of(context, "old", 3) == ((("old", 0),), 1)
    assert answers_of(context, "dog", 99) == ((("dog", 13),), 1)
    for value, start, message in (
        ("Old", None, "answer 'Old' is not in its context"),
        ("cat", "four", "answer_start is 'four'"),
        (5, None, "answers is 5; give a string, or an object"),
        ({"text": ["cat"], "answer_start": [1, 2]}, None, "answers is"),
    ):
        with pytest.raises(UserError, match=message):
            answers_of(context, value, start)


def test_windows_are_those_of_the_paper_unless_asked_for_others(
    bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Span, "longest_row", 16)
    task = Span([question(CONTEXT, "old")], [question(CONTEXT, "cat")])
    for max_length, length in ((0, 16), (24, 24)):
        lesson = Lesson.read(task, bert, Recipe(max_length=max_length, device="cpu"))
        assert max(len(row["input_ids"]) for row in lesson.train.rows) == length
        lesson.announce()
        assert f"with a shortened question, in windows of {length} tokens" in capsys.readouterr().out
