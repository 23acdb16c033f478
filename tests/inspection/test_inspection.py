"""What the inspection tool says of a dataset is what is in it; what it prints is the text that went in."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metro_megatron.commands.inspect_data as tool
from metro_megatron.cli.command_line import call_with_options
from metro_megatron.config.file import save_config
from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.manifest import LengthHistogram
from metro_megatron.data.samples import build_sample_index
from metro_megatron.data.shards import open_shards
from metro_megatron.errors import UserError
from metro_megatron.inspection.documents import SampleLengths, all_sources, by_powers, source_lengths
from metro_megatron.inspection.readback import DatasetReader, TokenText, samples_of, visible
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.train.journal import note_rollback
from metro_megatron.vocabulary import BOS_ID, EOS_ID
from tests.data.two_sources import texts_of, write_two_sources

Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, reviews: list[list[str]], tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    write_two_sources(folder, reviews, tokenizer_folder)
    return folder


def test_statistics_are_those_of_each_source_alone(folder: Path) -> None:
    read: list[int] = []
    sources = source_lengths(str(folder / "d"), read.append)
    assert [source.name for source in sources] == ["long", "short"]
    shards = open_shards([str(folder / "d")])
    assert sum(read) == sum(shard.tokens.nbytes for shard in shards)
    prefixes = [folder / "parts" / "long", folder / "parts" / "short", folder / "d"]
    for source, prefix in zip([*sources, all_sources(sources)], prefixes, strict=True):
        shards = open_shards([str(prefix)])
        assert source.statistics.tokens == sum(len(shard.tokens) for shard in shards)
        for samples in source.samples:
            lengths = build_sample_index(shards, samples.seq_length).length + 2
            assert samples.counts.tolist() == np.bincount(lengths, minlength=samples.seq_length + 1).tolist()
            padding = np.mean(samples.seq_length - lengths) / samples.seq_length
            assert samples.padded_waste == pytest.approx(padding, abs=1e-12)
            assert 0 <= samples.packed_waste < 1 / 64 < samples.padded_waste


@pytest.mark.parametrize("length", [512, 400, 90])
def test_rows_are_as_long_as_samples_of_one_length_need(length: int) -> None:
    samples = SampleLengths(512, np.bincount([length] * 7, minlength=513))
    assert samples.padded_waste == 1 - length / 512
    assert 0 <= samples.packed_waste < 0.02
    if length == 512:
        assert samples.packed_waste == 0


def test_histograms_by_powers_of_two() -> None:
    counts = by_powers(LengthHistogram.from_lengths([1, 2, 3, 4, 7, 8, 511, 512]))
    assert counts[:11].tolist() == [1, 2, 2, 1, 0, 0, 0, 0, 1, 1, 0] and counts.sum() == 8


def test_printed_statistics_and_picture(folder: Path, tmp_path: Path, capsys: Printed) -> None:
    picture = tmp_path / "new" / "lengths.svg"
    tool.main(tool.Options([str(folder / "d")], picture=str(picture)))
    printed = capsys.readouterr().out
    assert re.findall(r"^(\S.*)\n  documents +([\d,]+)$", printed, re.M) == [
        ("long", "300"),
        ("short", "200"),
        ("all sources", "500"),
    ]
    rows = re.findall(r"^ +([\d,]+) to [\d,]+ +([\d,]+) ", printed, re.M)
    assert sum(int(count.replace(",", "")) for _, count in rows) == 1000 and f"made {picture}" in printed
    assert "short" in picture.read_text() and picture.stat().st_size > 10_000
    with pytest.raises(UserError, match="name a .png"):
        tool.main(tool.Options([str(folder / "d")], picture=str(tmp_path / "lengths.doc")))


def test_documents_come_back_as_the_lines_that_went_in(folder: Path, reviews: list[list[str]], capsys: Printed) -> None:
    texts = texts_of(reviews)
    expected = [(name, document) for name, documents in texts.items() for document in documents]
    tool.main(tool.Options([str(folder / "d")], documents=1000))
    blocks = capsys.readouterr().out.removesuffix("\n\n").split("\n\n")
    assert len(blocks) == 500
    for number, (block, (name, document)) in enumerate(zip(blocks, expected, strict=True)):
        head, *lines = block.split("\n")
        assert head.startswith(f"document {number} of {name}, ") and f", {len(document)} units," in head
        assert lines == [f"  {visible(paragraph)}" for paragraph in document]


def test_documents_at_random_are_the_seeds(folder: Path) -> None:
    reader = DatasetReader(str(folder / "d"))
    chosen = list(reader.numbers(50, 3))
    assert chosen == sorted(set(chosen)) == list(reader.numbers(50, 3)) != list(reader.numbers(50, 4))
    assert len(chosen) == 50 and max(chosen) > 300 and list(reader.numbers(9999, 3)) == list(range(500))


def test_samples_are_those_of_the_index(folder: Path, capsys: Printed) -> None:
    shards = open_shards([str(folder / "d")])
    index = build_sample_index(shards, 64)
    reader = DatasetReader(str(folder / "d"))
    samples = [ids for number in range(len(reader)) for ids in reader[number].samples(64)]
    assert [len(ids) - 2 for ids in samples] == index.length.tolist()
    for place in range(0, len(index), 37):
        start = index.start[place]
        content = shards[index.shard[place]].tokens[start : start + index.length[place]]
        assert samples[place].tolist() == [BOS_ID, *content.tolist(), EOS_ID]
    tool.main(tool.Options([str(folder / "d")], samples=17, seq_length=64))
    blocks = capsys.readouterr().out.removesuffix("\n\n").split("\n\n")
    nothing = [np.zeros(len(ids), np.bool_) for ids in samples]
    assert [block.split("\n  ")[1] for block in blocks] == list(map(reader.text.marked, samples[:17], nothing[:17]))
    chosen = list(reader.samples(40, 64, 3))
    assert len(chosen) == 40 and chosen == list(reader.samples(40, 64, 3))
    assert [int(one.split(" ")[1].replace(",", "")) for one in chosen] == list(reader.numbers(40, 3))


@pytest.mark.parametrize(
    "text", ["a long film", " two  spaces ", "día \U0001f600 名", "\x1b[31m red\t\u200b", "[x] <mask>"]
)
def test_masked_tokens_stand_in_brackets(tokenizer_folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    shown = TokenText(tokenizer)
    content = tokenizer.encode(text)
    ids = np.array([BOS_ID, *content, EOS_ID])
    assert shown.plain(content) == visible(text) and visible(text).isprintable()
    assert shown.marked(ids, np.zeros(len(ids), np.bool_)) == f"<s> {visible(text)}</s>"
    is_masked = np.isin(np.arange(len(ids)), [1, len(ids) - 2])
    last = TokenText(tokenizer).marked(ids[[-2]], np.array([True]))
    marked = shown.marked(ids, is_masked)
    assert marked.startswith("<s>[") and marked.endswith(f"{last}</s>") and last[0] + last[-1] == "[]"


def test_a_mask_keeps_the_space_of_its_word(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    before, film, after = (tokenizer.encode(text) for text in ("This is a", "film", "with the"))
    ids = np.array([BOS_ID, *before, *film, *after, EOS_ID])
    is_masked = np.zeros(len(ids), np.bool_)
    is_masked[1 + len(before)] = True
    assert len(film) == 1 and TokenText(tokenizer).marked(ids, is_masked) == "<s> This is a[ film] with the</s>"


def test_ids_beyond_the_vocabulary_are_a_message(tokenizer_folder: Path) -> None:
    text = TokenText(Tokenizer.from_folder(tokenizer_folder))
    for wrong in (2000, -1):
        with pytest.raises(UserError, match=f"id {wrong} is not one of the 2,000"):
            text.plain([300, wrong])


def run_config(folder: Path, run: Path, **train: Any) -> Config:
    """A run over both sources."""
    prefixes = [str(folder / "parts" / name) for name in ("long", "short")]
    return Config(
        model=ModelConfig(vocab_size=2000, max_position_embeddings=64),
        data=DataConfig(train=prefixes, seq_length=64, micro_batch_tokens=512, index_cache=str(run.parent / "index")),
        optimizer=OptimizerConfig(lr_warmup_steps=1),
        train=TrainConfig(**{"output": str(run), "train_steps": 9, "global_batch_tokens": 2048, **train}),
    )


def show_step(config: Config, step: int, folder: Path, capsys: Printed, samples: int = 0) -> list[str]:
    save_config(config, folder / "config.yaml")
    tool.main(tool.Options(step=step, config=[str(folder / "config.yaml")], samples=samples))
    return capsys.readouterr().out.removesuffix("\n\n").split("\n\n")


PHASES = [Phase(2, seq_length=32), Phase(4, weights=[0, 1])]


@pytest.mark.parametrize(
    ("train", "whole_words"),
    [
        ({}, False),
        ({"global_batch_size": 24}, True),
        ({"phases": PHASES}, False),
        ({"phases": PHASES, "global_batch_size": 24}, False),
    ],
)
def test_a_step_is_what_the_ranks_of_the_run_read(
    folder: Path, tmp_path: Path, train: dict, whole_words: bool, capsys: Printed
) -> None:
    config = run_config(folder, tmp_path / "run", **train)
    config = replace(config, objective=ObjectiveConfig(whole_word_masking=whole_words))
    shards = open_shards(config.data.train)
    index, *others = [build_sample_index(shards, phase.data.seq_length) for phase in config.by_phase]
    tokenizer = Tokenizer.from_folder(shards[0].tokenizer_path)
    text, starts = TokenText(tokenizer), tokenizer.word_starts() if whole_words else None
    expected, totals = set(), set()
    for rank in range(2):
        data = PretrainingData(index, shards, config, dp_rank=rank, dp_size=2, phase_indices=others, word_starts=starts)
        *_, batch = data.prefetch(0, 5, 0)
        totals.add((batch.num_tokens, batch.num_masked))
        for micro_batch in batch.micro_batches:
            for sample, ids, is_masked in samples_of(micro_batch):
                expected.add((sample, int(is_masked.sum()), text.marked(ids, is_masked)))
    head, *blocks = show_step(config, 5, tmp_path, capsys)
    found = {
        (int(match[1].replace(",", "")), int(match[2]), block.split("\n  ")[1])
        for block in blocks
        if (match := re.search(r" sample ([\d,]+), .* (\d+) masked\n", block))
    }
    ((num_tokens, num_masked),) = totals
    assert found == expected and len(blocks) == len(expected)
    assert f"{len(blocks)} samples, {num_tokens:,} tokens, {num_masked:,} masked" in head
    # As before a run, whose vocabulary comes from the data.
    before = replace(config, model=replace(config.model, vocab_size=ModelConfig().vocab_size))
    assert show_step(before, 5, tmp_path, capsys, samples=3)[1:] == blocks[:3]


def test_padded_rows_hold_the_same_samples(folder: Path, tmp_path: Path, capsys: Printed) -> None:
    config = run_config(folder, tmp_path / "run", global_batch_size=24)
    padded = replace(config, data=replace(config.data, row_format="padded", micro_batch_size=4))
    texts = [
        sorted(block.split("\n  ")[1] for block in show_step(one, 2, tmp_path, capsys)[1:]) for one in (config, padded)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 24


def test_a_long_run_is_entered_where_it_was_logged(folder: Path, tmp_path: Path, capsys: Printed) -> None:
    config = run_config(folder, tmp_path / "run")
    expected = show_step(config, 4, tmp_path, capsys)
    fourth, first = (
        int(re.search(r"sample ([\d,]+)", one[1])[1].replace(",", ""))
        for one in (expected, show_step(config, 1, tmp_path, capsys))
    )
    assert fourth != first
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "run_config.yaml")
    lines = [{"step": 3, "consumed_samples": 0}, {"step": 3, "validation/x": 1}, {"step": 5, "consumed_samples": 7}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    assert f"sample {first:,}," in show_step(config, 4, tmp_path, capsys)[1]
    note_rollback(tmp_path / "run", range(4), "a spike", print)
    assert show_step(config, 4, tmp_path, capsys)[0].startswith("step 4: passed over, the run went back from it")
    # Another run, that no kernel could compute.
    other = replace(config, model=replace(config.model, num_attention_heads=48))
    assert show_step(other, 4, tmp_path, capsys) == expected
    skipping = replace(other, train=replace(other.train, skip_steps=["2-4"]))
    head, *blocks = show_step(skipping, 4, tmp_path, capsys)
    assert head == expected[0].replace("step 4: ", "step 4: passed over, train.skip_steps 2-4: ")
    assert blocks == expected[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--dataset: needed"),
        ({"step": 3}, "needs --config"),
        ({"dataset": ["none"], "config": ["x.yaml"]}, "--config: is read for --step"),
        ({"dataset": ["none"]}, "no such dataset"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tool.main(tool.Options(**options))


def test_negative_counts_are_refused() -> None:
    with pytest.raises(UserError, match="--documents is -1, must be at least 0"):
        call_with_options(tool.main, ["--dataset", "none", "--documents", "-1"])


def test_steps_that_a_run_does_not_have(folder: Path, tmp_path: Path, capsys: Printed) -> None:
    config = run_config(folder, tmp_path / "run")
    for wrong in (10, -1):
        with pytest.raises(UserError, match=rf"--step {wrong}: must"):
            show_step(config, wrong, tmp_path, capsys)
