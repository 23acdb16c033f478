"""Overlaps with evaluation texts are those that sets of word n-grams find."""

import json
import pickle
import random
import re
from pathlib import Path

import pytest

from metro_megatron.errors import UserError
from metro_megatron.preprocess import decontamination
from metro_megatron.preprocess.decontamination import NGRAM_WORDS, SHORTEST_TEXT, EvaluationNgrams


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9\u0080-\U0010ffff]+", text.lower())


def ngrams(text: str, size: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[at : at + size]) for at in range(len(found) - size + 1)}


def overlaps(text: str, evaluation: list[str]) -> bool:
    sizes = [min(NGRAM_WORDS, len(words(one))) for one in evaluation]
    return any(
        size >= SHORTEST_TEXT and ngrams(text, size) & ngrams(one, size)
        for one, size in zip(evaluation, sizes, strict=True)
    )


@pytest.mark.parametrize("block", [1, 100, 1 << 16])
def test_random_texts_against_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Three words, so that n-grams repeat; 20 documents in one call, so that none may reach into the next."""
    monkeypatch.setattr(decontamination, "_BLOCK", block)
    rng = random.Random(block)

    def text(length: int) -> str:
        return "".join(rng.choice(["a", "Ab", "é"]) + rng.choice([" ", "-", "\n", "! ", " "]) for _ in range(length))

    for case in range(15):
        files = [[text(rng.choice([3, 8, 9, 12, 13, 14, 20])) for _ in range(4)] for _ in range(3)]
        files[0].append("a b c d e f g h")
        documents = [text(rng.choice([0, 1, 7, 8, 40, 300])) for _ in range(20)] + ["", "A, B; C d E f g H!", "é" * 50]
        for number, texts in enumerate(files):
            lines = (json.dumps({"q": {"x": [one]}, "n": 1}) + "\n" for one in texts)
            (tmp_path / f"{case}-{number}.jsonl").write_text("".join(lines))
        found = EvaluationNgrams.from_files([str(tmp_path / f"{case}-{number}.jsonl") for number in range(3)])
        assert found.hits(documents).tolist() == [[overlaps(one, texts) for texts in files] for one in documents]
        assert found.texts + found.ignored == sum(map(len, files))


def test_plain_text_and_documents_that_touch(tmp_path: Path) -> None:
    numbers = [f"w{number}" for number in range(26)]
    (tmp_path / "e.txt").write_text(" ".join(numbers[:13]) + "\n\n" + " ".join(numbers[13:]))
    found = pickle.loads(pickle.dumps(EvaluationNgrams.from_files([str(tmp_path / "e.txt")])))
    whole = ["x " + " ".join(numbers[:13]) + " y", " ".join(numbers[14:]), " ".join(numbers[13:])]
    assert found.hits(whole).tolist() == [[True], [False], [True]]
    assert found.repeated(whole).tolist() == [True] and found.repeated(whole[1:2]).tolist() == [False]
    assert found.hits([" ".join(numbers[:6]), " ".join(numbers[6:13])]).tolist() == [[False], [False]]
    assert found.hits([]).tolist() == []


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    for content, message in (
        (b'{"a": "too short"}', "at least 8 words"),
        (b"{bad", "byte 0 cannot be read"),
        (b"", "at least 8"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            EvaluationNgrams.from_files([str(path)])
