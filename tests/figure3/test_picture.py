"""The picture's numbers are those of the runs' logs; the language is the same every time."""

import json
from pathlib import Path

import pytest

from tools.figure3.picture import LEGENDS, collect, draw
from tools.figure3.texts import DOCUMENT_WORDS, PHRASE_WORDS, documents


def test_curves_are_the_logged_figures(tmp_path: Path) -> None:
    for number, arm in enumerate(LEGENDS):
        (tmp_path / arm).mkdir()
        lines = [{"step": step, "replace_rate": 0.1, "replace_accuracy": number + step} for step in (10, 20, 30)]
        (tmp_path / arm / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    curves = collect(tmp_path)
    for number, arm in enumerate(LEGENDS):
        assert curves[arm] == {
            "step": [10, 20, 30],
            "replace_rate": [0.1] * 3,
            "replace_accuracy": [number + 20] * 3,
        }
    pytest.importorskip("matplotlib")
    left, right = draw(curves).axes
    assert [line.get_label() for line in right.lines] == list(LEGENDS.values())
    assert left.lines[0].get_xydata().tolist() == [[10, 0.1], [20, 0.1], [30, 0.1]]


def test_a_document_repeats_a_phrase() -> None:
    texts = [text.split() for text in documents(50)]
    assert texts == [text.split() for text in documents(50)]
    for words in texts:
        length = len(set(words))
        assert len(words) == DOCUMENT_WORDS and PHRASE_WORDS[0] <= length <= PHRASE_WORDS[1]
        assert words[length:] == words[:-length]
