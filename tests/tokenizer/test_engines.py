"""Engines against SentencePiece itself, on real and hostile text."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from metro_megatron.errors import UserError
from metro_megatron.tokenizer import engines
from metro_megatron.tokenizer.engines import AUTO, GIGATOKEN, SENTENCEPIECE, Engine
from metro_megatron.vocabulary import SPECIAL_TOKENS

FRAGMENTS = (
    *SPECIAL_TOKENS,
    *("<0x41>", "<0xFF>", "<S>", "< s>", "<s", "s>", "\u2581", "\u2581\u2581", " ", "  ", "\t", "\n", "\r\n", "\0"),
    *("\x7f", "\x85", "\u00a0", "\u200b", "\u200d", "\u2028", "\u3000", "\ufeff", "\ufffd", "\ufffe", "\ue000"),
    *("\U0010ffff", "\u0301", "a", "aa", "-", "--", "...", "!", "the", "The", " movie", "ing", "'s", "\u00e9"),
    *("e\u0301", "\ufb01", "\u0130", "\u6f22", "\u0627\u0644", "\U0001f642", "\U0001f468\u200d\U0001f469", "1,000.50"),
)


@pytest.fixture(scope="module", params=(GIGATOKEN, SENTENCEPIECE))
def engine(tokenizer_folder: Path, request: pytest.FixtureRequest) -> Engine:
    made = Engine.create(tokenizer_folder, request.param)
    assert made.name == request.param
    return made


@pytest.fixture(scope="module")
def processor(tokenizer_folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))


def assert_equal(engine: Engine, processor: sentencepiece.SentencePieceProcessor, texts: Sequence[str]) -> None:
    ids, lengths = engine.encode(texts)
    assert ids.dtype == lengths.dtype == np.int32
    expected = processor.encode(list(texts))
    assert lengths.tolist() == [len(one) for one in expected]
    assert ids.tolist() == [i for one in expected for i in one]


def test_real_text(engine: Engine, processor: sentencepiece.SentencePieceProcessor, reviews: list[list[str]]) -> None:
    units = [unit for review in reviews for unit in review]
    assert_equal(engine, processor, units)
    assert_equal(engine, processor, ["\n".join(review) for review in reviews])
    assert_equal(engine, processor, [units[0], "<s>", units[1], "x</s>", units[2], ""])
    assert_equal(engine, processor, [])


def test_hostile_text(engine: Engine, processor: sentencepiece.SentencePieceProcessor) -> None:
    generator = random.Random(7)
    texts = ["", *FRAGMENTS, "x" * 50_000, "-" * 50_001, "<s>" * 500, " " * 3000, "\u6f22" * 3000]
    texts += ["".join(generator.choices(FRAGMENTS, k=generator.randrange(1, 30))) for _ in range(10_000)]
    texts += ["".join(generator.choices(FRAGMENTS[5:], k=generator.randrange(1, 30))) for _ in range(10_000)]
    assert_equal(engine, processor, texts)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(FRAGMENTS)).map("".join)), max_size=6))
def test_any_text(engine: Engine, processor: sentencepiece.SentencePieceProcessor, texts: list[str]) -> None:
    assert_equal(engine, processor, texts)


def test_the_engine_is_chosen_and_announced(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert Engine.create(tokenizer_folder, AUTO).name == GIGATOKEN
    with pytest.raises(UserError, match="auto, gigatoken or sentencepiece"):
        Engine.create(tokenizer_folder, "fastest")
    with monkeypatch.context() as patched:
        patched.setattr(engines.importlib.util, "find_spec", lambda name: None)
        assert Engine.create(tokenizer_folder, AUTO).name == SENTENCEPIECE
        assert "as gigatoken is not installed" in capfd.readouterr().err
        with pytest.raises(UserError, match="is not installed; pip install gigatoken"):
            Engine.create(tokenizer_folder, GIGATOKEN)


def test_an_inexact_engine_is_not_used(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def without_control_strings(self: engines._Gigatoken, texts: Sequence[str]) -> engines.Encoded:
        return self._encode_all(list(texts))

    monkeypatch.setattr(engines._Gigatoken, "encode", without_control_strings)
    assert Engine.create(tokenizer_folder, AUTO).name == SENTENCEPIECE
    assert "for '<s>'" in capfd.readouterr().err
    with pytest.raises(UserError, match="gives .* and sentencepiece"):
        Engine.create(tokenizer_folder, GIGATOKEN)
