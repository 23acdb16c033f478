"""Tokenizer against SentencePiece, tokenizer.json against both, on real and hostile text."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from metro_megatron.errors import UserError
from metro_megatron.tokenizer.tokenizer import Tokenizer, copy_tokenizer
from metro_megatron.tokenizer.training import train_sentencepiece, train_tokenizer
from metro_megatron.vocabulary import MASK_ID, SPECIAL_TOKENS

FRAGMENTS = [
    *SPECIAL_TOKENS,
    *(
        "<0x41>",
        "<0xFF>",
        "<S>",
        "< s>",
        "\u2581",
        "\u2581\u2581",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\x00",
        "\x7f",
        "\x85",
    ),
    *(
        "\u00a0",
        "\u200b",
        "\u200d",
        "\u2028",
        "\u3000",
        "\ufeff",
        "\ufffd",
        "\ufffe",
        "\ue000",
        "\U0010ffff",
        "\u0301",
    ),
    *(
        "a",
        "aa",
        "-",
        "--",
        "...",
        "!",
        "the",
        "The",
        " movie",
        "ing",
        "'s",
        "\u00e9",
        "e\u0301",
        "\ufb01",
        "\u0130",
    ),
    *(
        "\u6f22",
        "\u0627\u0644",
        "\U0001f642",
        "\U0001f468\u200d\U0001f469",
        "1,000.50",
        "http://x.y/?a=b",
        "a_b",
    ),
]


def test_ids_are_sentencepieces_on_real_text(tokenizer_folder: Path, reviews: list[list[str]]) -> None:
    texts = [unit for review in reviews for unit in review]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    expected = processor.encode(texts)
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    assert tokenizer.encode_batch(texts) == expected
    assert tokenizer.encode_batch(texts) == expected, "with every word remembered"
    assert [tokenizer.decode(ids) for ids in expected] == texts
    fast = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert [e.ids for e in fast.encode_batch(texts, add_special_tokens=False)] == expected


def test_ids_are_sentencepieces_on_hostile_text(tokenizer_folder: Path) -> None:
    generator = random.Random(7)
    texts = ["", *FRAGMENTS, "x" * 5000, "-" * 5001, "<s>" * 500, " " * 300]
    texts += ["".join(generator.choices(FRAGMENTS, k=generator.randrange(1, 30))) for _ in range(10_000)]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    expected = processor.encode(texts)
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    assert tokenizer.encode_batch(texts) == expected
    assert min(i for ids in expected for i in ids) > MASK_ID, "control strings stay text"
    assert [tokenizer.decode(ids) for ids in expected] == processor.decode(expected)
    fast = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for text, ids in zip(texts, expected, strict=True):
        if not any(token in text for token in SPECIAL_TOKENS):
            assert fast.encode(text, add_special_tokens=False).ids == ids, repr(text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_survives(tokenizer_folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


def test_added_tokens_are_found_anywhere_and_offsets_are_those_of_words(tokenizer_folder: Path) -> None:
    """As the entity markers that relation extraction adds to a tokenizer."""
    fast = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    text = "Paris (https) is a  good\tcity, the best <mask> of all."
    before = fast.encode(text)
    words = {text[begin:end] for begin, end in before.offsets if end > begin}
    assert not any(word != word.strip(" ") for word in words) and {"the", "good", "of", "all", "<mask>"} <= words
    reached = sorted({place for begin, end in before.offsets for place in range(begin, end)})
    assert reached == [place for place, one in enumerate(text) if one != " "]
    assert fast.add_tokens(["<e1>", "</e1>", "https"]) == 3
    for marked in ("<e1>Paris</e1> (https) is", "Paris</e1>(https)<e1>"):
        found = fast.encode(marked, add_special_tokens=False)
        assert {marked[slice(*offsets)] for offsets in found.offsets} >= {"</e1>", "https", "<e1>"}, found.tokens
        assert fast.decode(found.ids, skip_special_tokens=False).replace(" ", "") == marked.replace(" ", "")


def test_auto_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    code = """
import sys
from transformers import AutoTokenizer
for folder in sys.argv[1:]:
    t = AutoTokenizer.from_pretrained(folder)
    assert (len(t), t.model_max_length) == (2000, 512), (len(t), t.model_max_length)
    assert (t.bos_token_id, t.pad_token_id, t.eos_token_id) == (0, 1, 2)
    assert (t.unk_token_id, t.mask_token_id) == (3, 4)
    assert (t.cls_token_id, t.sep_token_id) == (0, 2)
    one, two = (t(x, add_special_tokens=False)["input_ids"] for x in ("a good film", "it is"))
    single, pair = t("a good film"), t("a good film", "it is")
    assert single["input_ids"] == [0, *one, 2], single
    assert pair["input_ids"] == [0, *one, 2, 2, *two, 2], pair
    assert list(pair) == ["input_ids", "attention_mask"], list(pair)
    whole = t("a good film.")["input_ids"]
    assert t("a <mask> film.")["input_ids"] == [i if i != t("good")["input_ids"][1] else 4 for i in whole]
    assert t("(<mask>)")["input_ids"].count(4) == 1 and t("<mask>")["input_ids"] == [0, 4, 2]
    assert t.decode(whole, skip_special_tokens=True) == "a good film."
    t.save_pretrained(sys.argv[1] + "/../saved")
"""
    copy_tokenizer(tokenizer_folder, tmp_path / "copy")
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", code, str(tmp_path / "copy"), str(tmp_path / "saved")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_training_is_reproducible_and_sized_exactly(reviews: list[list[str]], tmp_path: Path) -> None:
    report = train_tokenizer(reviews[:200], 1000, tmp_path / "a")
    train_tokenizer(reviews[:200], 1000, tmp_path / "b")
    first, second = Tokenizer.from_folder(tmp_path / "a"), Tokenizer.from_folder(tmp_path / "b")
    assert first.sha256 == second.sha256
    assert first.vocab_size == report.vocab_size == 1000
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    sampled_bytes = sum(len(unit.encode()) for review in reviews[:200] for unit in review)
    assert report.sampled_bytes == report.checked_bytes == sampled_bytes


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        ([], 300, "no documents"),
        ([["hello world"]], 261, "below 262"),
        ([["hello world"]], 8192, r"8192 is above \d+"),
        ([[" ".join(map(chr, range(0x4E00, 0x5000)))]], 300, r"300 is below the \d+"),
    ],
)
def test_training_refuses(documents: list[list[str]], vocab_size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(documents, vocab_size, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_foreign_models_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(tokenizer_folder, tmp_path)
    model = tmp_path / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)
    lines = ["some words are here and there are some more words", "and here"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tokenizer"), vocab_size=18, minloglevel=2
    )
    with pytest.raises(UserError) as refused:
        Tokenizer.from_folder(tmp_path)
    assert "ids 0 to 4" in str(refused.value)
    assert "byte" in str(refused.value)
    copy_tokenizer(tokenizer_folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks tokenizer\.json"):
        Tokenizer.from_folder(tmp_path / "copy")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "[MASK]": 1}, "[UNK]")
    tokenizers.Tokenizer(words).save(str(tmp_path / "copy" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged, or of another tokenizer than tokenizer\.model"):
        Tokenizer.from_folder(tmp_path / "copy")


def test_reproducible_whatever_the_text(reviews: list[list[str]]) -> None:
    units = ["<s> literal </s> <mask>", "\x00\t tab", *reviews[0], *reviews[1]] * 3
    assert train_sentencepiece(units, 400) == train_sentencepiece(units, 400)
