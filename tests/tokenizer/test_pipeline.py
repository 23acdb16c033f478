"""Tokenizers of others: their own ids, special ones wherever they are, through preprocessing and back to a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from metro_megatron.data.shards import open_shards
from metro_megatron.errors import UserError
from metro_megatron.preprocess.options import PlanOptions, PreprocessOptions
from metro_megatron.preprocess.run import preprocess
from metro_megatron.tokenizer.engines import AUTO, GIGATOKEN, TOKENIZERS, Engine
from metro_megatron.tokenizer.tokenizer import Tokenizer, copy_tokenizer
from metro_megatron.vocabulary import SpecialIds
from tests.tokenizer.others import KINDS, write_other

HOSTILE = (
    "[MASK] and <mask>",
    "a [CLS]b</s> c",
    "\u6f22 \U0001f468 x",
    "",
    "  two  spaces ",
    "metroword's 1,000.5 end",
)


@pytest.fixture(scope="module", params=KINDS)
def other(
    request: pytest.FixtureRequest, reviews: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, tokenizers.Tokenizer]:
    """A kind, its folder, and the tokenizer as its own library has it."""
    folder = tmp_path_factory.mktemp(request.param) / "tokenizer"
    return request.param, folder, write_other(request.param, (unit for one in reviews[:60] for unit in one), folder)


def test_special_ids_are_found_wherever_they_are(other: tuple[str, Path, tokenizers.Tokenizer]) -> None:
    kind, folder, theirs = other
    tokenizer = Tokenizer.from_folder(folder)
    last = theirs.token_to_id("[MASK]" if kind == "unigram" else "<mask>")
    assert (
        tokenizer.special_ids
        == {
            "wordpiece": SpecialIds(bos=101, pad=0, eos=102, mask=103, others=(100,)),
            "bytes": SpecialIds(bos=0, pad=1, eos=2, mask=last, others=(3,)),
            "unigram": SpecialIds(bos=1, pad=0, eos=2, mask=last, others=(3,)),
        }[kind]
    )
    assert tokenizer.vocab_size == theirs.get_vocab_size()
    for text in HOSTILE:
        assert set(tokenizer.encode(text)).isdisjoint(tokenizer.special_ids.reserved), text
    starts = tokenizer.word_starts()
    assert starts is not None
    words = "the film, whichever"
    pieces = tokenizer.encode(words)
    # A byte-level tokenizer writes no space before the first word of a text.
    assert [starts[one] for one in pieces].count(True) == {"wordpiece": 4, "bytes": 2, "unigram": 3}[kind]
    written = b"".join(map(tokenizer.piece, pieces)).decode().strip()
    assert written == (words.replace(",", " ,") if kind == "wordpiece" else words)


def test_ids_are_those_of_tokenizers_document_by_document(
    other: tuple[str, Path, tokenizers.Tokenizer], reviews: list[list[str]], tmp_path: Path
) -> None:
    kind, folder, theirs = other
    documents = reviews[:150]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "\n".join(one)}) + "\n" for one in documents))
    prefix = str(tmp_path / "out" / "s")
    preprocess(PreprocessOptions([str(tmp_path / "a.jsonl")], str(folder), prefix, PlanOptions()))
    (shard,) = open_shards([prefix])
    ends = np.cumsum(shard.unit_lengths)
    found = iter(np.split(np.asarray(shard.tokens), ends[:-1]))
    for units in documents:
        for unit in units:
            assert next(found).tolist() == theirs.encode(unit, add_special_tokens=False).ids
    assert shard.special_ids == Tokenizer.from_folder(folder).special_ids
    stored = json.loads(Path(f"{prefix}.manifest.json").read_text())
    assert stored["special_ids"]["mask"] == shard.special_ids.mask
    if kind == "bytes":
        assert Engine.create(folder, AUTO).name == GIGATOKEN
    slow, fast = Engine.create(folder, TOKENIZERS), Engine.create(folder, AUTO)
    for one, other_one in zip(slow.encode(HOSTILE), fast.encode(HOSTILE), strict=True):
        assert one.tolist() == other_one.tolist()


def test_the_folder_kept_gives_transformers_the_same_ids(
    other: tuple[str, Path, tokenizers.Tokenizer], tmp_path: Path
) -> None:
    _, folder, theirs = other
    copy_tokenizer(folder, tmp_path / "once")
    copy_tokenizer(tmp_path / "once", tmp_path / "twice")
    first, second = (Tokenizer.from_folder(tmp_path / name) for name in ("once", "twice"))
    assert first.files == second.files and first.sha256 == second.sha256 == Tokenizer.from_folder(folder).sha256
    loaded, ids = AutoTokenizer.from_pretrained(tmp_path / "once"), first.special_ids
    found = loaded("the old film", "was good")
    parts = [theirs.encode(text, add_special_tokens=False).ids for text in ("the old film", "was good")]
    assert found["input_ids"] == [ids.bos, *parts[0], ids.eos, *parts[1], ids.eos]
    assert list(found) == ["input_ids", "attention_mask"]
    named = (loaded.cls_token_id, loaded.pad_token_id, loaded.sep_token_id, loaded.mask_token_id)
    assert named == (ids.bos, ids.pad, ids.eos, ids.mask)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (ids.bos, ids.eos)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_sentencepiece_model_alone(model_type: str, reviews: list[list[str]], tmp_path: Path) -> None:
    """As `tokenizers` reads it; on plain text those are SentencePiece's own ids."""
    units = [unit for one in reviews[:60] for unit in one]
    folder = tmp_path / "model"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(units),
        model_prefix=str(folder / "spm"),
        model_type=model_type,
        vocab_size=400,
        unk_id=0,
        bos_id=7,
        eos_id=8,
        pad_id=9,
        control_symbols=["<mask>"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    tokenizer = Tokenizer.from_folder(folder)
    ids = SpecialIds(bos=7, pad=9, eos=8, mask=processor.piece_to_id("<mask>"), others=(0,))
    assert (tokenizer.special_ids, tokenizer.vocab_size) == (ids, 400)
    plain = [" ".join(unit.split()) for unit in units if unit.isascii()][:200]
    assert tokenizer.encode_batch(plain) == processor.encode(plain)
    copy_tokenizer(folder, tmp_path / "kept")
    assert Tokenizer.from_folder(tmp_path / "kept").sha256 == tokenizer.sha256
    loaded = AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert loaded(plain[0]).input_ids == [7, *processor.encode(plain[0]), 8]


def test_files_of_a_class_of_transformers(tmp_path: Path) -> None:
    """BERT's vocab.txt, without a tokenizer.json."""
    words = ["[PAD]", "the", "[UNK]", "[CLS]", "film", "##s", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_ids == SpecialIds(bos=3, pad=0, eos=6, mask=7, others=(2,))
    assert tokenizer.encode("The films was") == [1, 4, 5, 2]


def test_bytes_that_were_trained_as_special_tokens_are_text(tmp_path: Path) -> None:
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    names = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=names, show_progress=False)
    theirs.train_from_iterator(["ab ba"], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_ids == SpecialIds(bos=1, pad=3, eos=2, mask=4, others=(0,))
    assert tokenizer.encode("a\u00e9b") == theirs.encode("a\u00e9b").ids
    gaps = {"a": 0, "b": 3, **{name: 10 + number for number, name in enumerate(names[:4])}}
    broken = tokenizers.Tokenizer(tokenizers.models.WordLevel(gaps, unk_token="<unk>"))
    broken.add_special_tokens(["c", "d", "e", "f", "<mask>"])  # as ids 6 to 10
    broken.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="the tokenizer has .* and .* as id 10, so that text cannot be told"):
        Tokenizer.from_folder(tmp_path)


def test_missing_and_shared_tokens_are_named_together(tmp_path: Path) -> None:
    words = {token: number for number, token in enumerate(["<s>", "</s>", "a", "b"])}
    for name, settings in {"missing": {}, "shared": {"pad_token": "</s>", "mask_token": "a"}}.items():
        folder = tmp_path / name
        folder.mkdir()
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a")).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    missing = r"has no padding token \(\[PAD\] or <pad>\), mask token .*; add it with add_special_tokens"
    with pytest.raises(UserError, match=missing):
        Tokenizer.from_folder(tmp_path / "missing")
    with pytest.raises(UserError, match="</s> is the padding token and the end token"):
        Tokenizer.from_folder(tmp_path / "shared")
    (tmp_path / "missing" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: its tokenizer cannot be read"):
        Tokenizer.from_folder(tmp_path / "missing")
