"""tools/train_tokenizer.py as users run it."""

import json
import os
from functools import partial
from pathlib import Path

import orjson
import pytest

from metro_megatron.cli.command_line import call_with_options
from metro_megatron.commands.train_tokenizer import Options, main
from metro_megatron.errors import UserError
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.tokenizer.training import fitting_vocab_size, train_tokenizer


def test_sources_are_sampled_and_reported(
    reviews: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [orjson.dumps({"title": one[0], "body": "\n".join(one)}) + b"\n" for one in reviews[:300]]
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.jsonl").write_bytes(b"".join(records[:200]) + b"{\n")
    (tmp_path / "films" / "b.jsonl").write_bytes(b"".join(records[200:]))
    (tmp_path / "plain.txt").write_text("\n\n".join("\n".join(one) for one in reviews[300:600]))
    inputs = [f"films={tmp_path / 'films'}", f"plain={tmp_path / 'plain.txt'}"]
    output = tmp_path / "tokenizer"
    main(Options(inputs, str(output), vocab_size=1500, sample_bytes=400_000, text_key=["title", "body"]))
    printed = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    sources = report["sources"]
    assert list(sources) == ["films", "plain", "all"]
    assert report["rejects"] == {"invalid_json": 1}
    assert report["vocab_size"] == Tokenizer.from_folder(output).vocab_size == 1500
    assert 350_000 < report["sampled_bytes"] <= 400_000
    assert sources["films"]["documents"] + sources["plain"]["documents"] == report["sampled_documents"] < 600
    assert "1 invalid_json" in printed and "plain" in printed
    assert printed.splitlines()[-1].endswith(f"--tokenizer {output} --output_prefix PREFIX")
    model = (output / "tokenizer.model").read_bytes()
    with pytest.raises(UserError, match="add --overwrite"):
        main(Options(inputs, str(output), vocab_size=1500))
    main(Options(inputs, str(output), 1500, 400_000, ["title", "body"], overwrite=True))
    assert (output / "tokenizer.model").read_bytes() == model
    assert json.loads((output / "report.json").read_text()) == report


def test_a_size_that_is_not_said_fits_the_text(reviews: list[list[str]], tmp_path: Path) -> None:
    """From a power of two by the bytes; fewer for a text that repeats itself, more for many characters."""
    assert [fitting_vocab_size(size) for size in (0, 1_000_000, 33_000_000, 10**9)] == [512, 1024, 65536, 128_000]
    texts = {"plain": reviews[:30], "repeated": [["a b"] * 3], "many": [[" ".join(map(chr, range(0x4E00, 0x5300)))]]}
    sizes = {name: train_tokenizer(text, 0, tmp_path / name).vocab_size for name, text in texts.items()}
    assert sizes["plain"] == 512 and sizes["repeated"] < 512 and sizes["many"] == 2048
    for name, size in sizes.items():
        assert Tokenizer.from_folder(tmp_path / name).vocab_size == size


def test_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("few words")
    with pytest.raises(UserError, match=r"128000 is above \d+"):
        main(Options([str(tmp_path / "a.txt")], str(tmp_path / "t"), vocab_size=128000))
    with pytest.raises(UserError, match="no documents"):
        main(Options([str(tmp_path / "a.txt")], str(tmp_path / "t"), max_document_bytes=3))
    with pytest.raises(UserError, match="--sample_bytes is 0, must be at least 1"):
        argv = ["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t"), "--sample_bytes", "0"]
        call_with_options(main, argv)


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metro_megatron.commands.train_tokenizer.read_documents", None)
    (tmp_path / "a.txt").write_text("few words")
    options = partial(Options, [str(tmp_path / "a.txt")])
    for output in ("a.txt", "a.txt/b/c"):
        with pytest.raises(UserError, match=r"a[.]txt is a file; choose a folder"):
            main(options(str(tmp_path / output)))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match=f"{tmp_path} may not be written"):
        main(options(str(tmp_path / "b" / "c")))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
