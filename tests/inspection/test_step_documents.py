"""Which documents a step has read: those of the trainer's batches, at the places that the documents say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import metro_megatron.commands.which_documents as tool
from metro_megatron.cli.command_line import call_with_options
from metro_megatron.config.file import save_config
from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.samples import build_sample_index
from metro_megatron.data.shards import open_shards
from metro_megatron.errors import UserError
from metro_megatron.inspection.readback import DatasetReader, TokenText, samples_of
from metro_megatron.inspection.step_documents import RunOrder
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.train.journal import note_rollback
from tests.data.two_sources import write_two_sources

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, reviews: list[list[str]], tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    write_two_sources(folder, reviews, tokenizer_folder)
    return folder


def write_run(folder: Path, run: Path, **train: Any) -> Config:
    """A run over a dataset of several shards and two sources, and one of one; its documents come by weight."""
    prefixes = [str(folder / "d"), str(folder / "parts" / "short")]
    config = Config(
        model=ModelConfig(vocab_size=2000, max_position_embeddings=64),
        data=DataConfig(
            train=prefixes, weights=[1, 3], seq_length=64, micro_batch_tokens=512, index_cache=str(run.parent / "index")
        ),
        optimizer=OptimizerConfig(lr_warmup_steps=1),
        train=TrainConfig(**{"output": str(run), "train_steps": STEPS, "global_batch_tokens": 2048, **train}),
    )
    run.mkdir()
    save_config(config, run / "run_config.yaml")
    return config


PHASES = [Phase(11, seq_length=32), Phase("50%", weights=[1, 0])]


@pytest.mark.parametrize(
    "train", [{}, {"global_batch_size": 24}, {"phases": PHASES}, {"phases": PHASES, "global_batch_size": 24}]
)
def test_the_samples_are_those_of_the_trainers_batches(folder: Path, tmp_path: Path, train: dict[str, Any]) -> None:
    config = write_run(folder, tmp_path / "run", **train)
    shards = open_shards(config.data.train)
    indices = [build_sample_index(shards, phase.data.seq_length) for phase in config.by_phase]
    data = PretrainingData(indices[0], shards, config, phase_indices=indices[1:])
    read = {}
    for batch in data.prefetch(0, STEPS, 0):
        samples = [one for micro_batch in batch.micro_batches for one in samples_of(micro_batch)]
        read[batch.step + 1] = sorted((number, ids[1:-1].tolist()) for number, ids, _ in samples)
    order = RunOrder(tmp_path / "run")
    for step in (1, 2, STEPS, 12, 20, 21):
        found = list(RunOrder(tmp_path / "run").samples(step, step))
        assert sorted((one.sample, one.ids.tolist()) for one in found) == read[step]
    everything = list(order.samples(1, STEPS))
    assert [one.position for one in everything] == list(range(sum(map(len, read.values()))))
    assert {one.epoch for one in everything if one.dataset == config.data.train[1]} >= {0, 1}, "read several times"


def test_numbers_and_places_are_those_of_the_documents(folder: Path, tmp_path: Path) -> None:
    config = write_run(folder, tmp_path / "run")
    readers = {prefix: DatasetReader(prefix) for prefix in config.data.train}
    found = list(RunOrder(tmp_path / "run").samples(3, 9))
    for one in found:
        document = readers[one.dataset][one.document]
        tokens = document.content.tokens[one.first_token : one.first_token + one.tokens]
        assert (tokens.tolist(), document.source) == (one.ids.tolist(), one.source)
    assert {one.source for one in found if one.dataset == config.data.train[0]} == {"long", "short"}
    assert any(one.first_token for one in found) and any(one.first_token == 0 for one in found)


def test_a_step_is_counted_from_what_the_run_has_left(folder: Path, tmp_path: Path) -> None:
    write_run(folder, tmp_path / "run")
    run, order = tmp_path / "run", RunOrder(tmp_path / "run")
    expected = next(order.samples(31, 31)).position
    (checkpoint := run / "iter_0000020").mkdir()
    twentieth = [sample.position for sample in order.samples(20, 20)][-1] + 1
    (checkpoint / "progress.json").write_text(json.dumps({"step": 20, "consumed_samples": twentieth}))
    lines = [{"step": 10, "consumed_samples": 0}, {"step": 30, "validation/x": 1}, {"step": 32, "consumed_samples": 5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "cons')
    counted: list[int] = []
    assert next(order.samples(31, 31, counted.append)).position == expected
    assert counted == list(range(21, 31)), "from the checkpoint on"
    assert next(order.samples(11, 11)).position == 0, "as the log says, which is not checked"
    write_run(folder, tmp_path / "other", global_batch_size=24)
    counted.clear()
    assert next(RunOrder(tmp_path / "other").samples(31, 31, counted.append)).position == 30 * 24 and not counted


def test_what_is_printed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    config = write_run(folder, run)
    call_with_options(tool.main, ["--run", str(run), "--step", "2", "3", "--json", "--text"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = list(RunOrder(run).samples(2, 3))
    text = TokenText(Tokenizer.from_folder(open_shards(config.data.train)[0].tokenizer_path))
    assert rows == [{**one.record, "passed_over": None, "text": text.plain(one.ids.tolist())} for one in expected]
    call_with_options(tool.main, ["--run", str(run), "--step", "2", "--text"])
    shown, first = capsys.readouterr().out, expected[0]
    last = first.first_token + first.tokens - 1
    assert shown.startswith(f"step 2: {sum(one.step == 2 for one in expected)} samples of ")
    assert (
        f"\n  {first.position}: document {first.document} of {first.source} in {first.dataset}, tokens "
        f"{first.first_token} to {last}, epoch {first.epoch}\n    {text.plain(first.ids.tolist())}\n"
    ) in shown
    assert f"--config {run}/run_config.yaml --step 2" in shown
    note_rollback(run, range(2, 3), "a spike", print)
    save_config(replace(config, train=replace(config.train, skip_steps=["2"])), run / "run_config.yaml")
    call_with_options(tool.main, ["--run", str(run), "--step", "2", "4", "--json"])
    said = {row["step"]: row["passed_over"] for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert said == {2: "train.skip_steps 2", 3: "the run went back from it (journal.jsonl)", 4: None}
    call_with_options(tool.main, ["--run", str(run), "--step", "2"])
    assert capsys.readouterr().out.startswith("step 2: passed over, train.skip_steps 2: ")


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    config = write_run(folder, tmp_path / "run")
    beyond = "is not within 1 to train.train_steps 40"
    for steps, problems in (
        ([0], [f"--step 0: {beyond}"]),
        ([41], [f"--step 41: {beyond}"]),
        ([-1, 2], [f"--step -1: {beyond}"]),
        ([50, 41], [f"--step 50: {beyond}", f"--step 41: {beyond}"]),
        ([3, 2], ["--step 3 2: must ascend; swap them"]),
        ([1, 2, 3], ["--step 1 2 3: give one step, or the first and the last one"]),
    ):
        with pytest.raises(UserError) as caught:
            tool.main(tool.Options(str(tmp_path / "run"), steps))
        assert caught.value.problems == problems
    with pytest.raises(UserError, match="run_config.yaml: no such file; give a run folder"):
        RunOrder(tmp_path)
    gone = replace(config, data=replace(config.data, train=[str(tmp_path / "gone")], weights=[]))
    save_config(gone, tmp_path / "run" / "run_config.yaml")
    with pytest.raises(UserError, match="there is no such dataset; write it with tools/preprocess_data.py$"):
        RunOrder(tmp_path / "run")
    save_config(replace(gone, data=replace(gone.data, train=["of/it"])), tmp_path / "run" / "run_config.yaml")
    with pytest.raises(UserError, match="or start this in the folder where the relative path begins$"):
        RunOrder(tmp_path / "run")
