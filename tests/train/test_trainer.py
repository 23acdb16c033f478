"""The loop: what is logged and saved when, and what ends a run."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from metro_megatron.checkpoint import save
from metro_megatron.checkpoint.files import iteration_folder, tracked_step
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.plan.flops import Amount, model_flops
from metro_megatron.train import trainer as module
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.past_updates import MAX_SKIPPED
from tests.distributed import run_ranks
from tests.parity import small_run
from tests.parity.small_run import small_config, small_corpus, start


def run(config: Config, skip: bool = False, stop_after: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of metrics.jsonl, and of what the run said; steps can be skipped, or SIGTERM come in one of them."""
    said: list[str] = []
    with patch.object(module, "copy_tokenizer"), patch.object(module.Report, "say", lambda _, line: said.append(line)):
        trainer = start(config)
        trainer.restore()
        train = trainer.step.train

        def spoiled(batch: Any, *others: Any) -> Any:
            update = train(batch, *others)
            if batch.step + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            if skip:
                read = update.read
                bad = {"is_skipped": True, "grad_norm": float("inf")}
                update.read = lambda: replace(read(), **bad)  # type: ignore[method-assign]
            return update

        trainer.step.train = spoiled  # type: ignore[method-assign]
        try:
            trainer.train()
        finally:
            trainer.close()
    lines = (Path(config.train.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], said


def config_for(folder: Path, **train: Any) -> Config:
    return small_config(train={"output": str(folder), "train_steps": 5, "log_interval": 2, **train})


def test_lines_come_when_they_are_due_and_the_loss_is_the_weighted_sum(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    ((lines, said),) = run_ranks(run, 1, config)
    assert [line["step"] for line in lines] == [2, 4, 5], "every second step, and the last"
    assert [line["consumed_samples"] for line in lines] == [48, 96, 120]
    for line in lines:
        weighted = line["aux_loss"] + 50 * line["rtd_loss"] + line["clm_loss"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-12)
    before = 0
    for line in lines:
        tokens, steps = line["consumed_tokens"] - before, line["step"] % 2 or 2
        least, most = (model_flops(config, Amount(tokens, squares)) for squares in (tokens, 48 * tokens))
        assert least < line["tflops_per_gpu"] * line["seconds_per_step"] * steps * 1e12 < most and "mfu" not in line
        before = line["consumed_tokens"]
    shown = next(one for one in said if one.startswith("step 2/5"))
    assert f"{lines[0]['tflops_per_gpu']:.3g} TFLOP/s/GPU (data" in shown
    assert f"aux {lines[0]['aux_loss']:.4f} rtd {lines[0]['rtd_loss']:.4f} clm" in shown
    assert f"replaced {lines[0]['replace_rate']:.3f} found {lines[0]['replace_accuracy']:.3f} filled" in shown
    assert f"filled {lines[0]['non_pad_fraction']:.3f} | grad norm" in shown
    warnings = [one for one in said if one.startswith("warning: only")]
    assert len(warnings) == 1, "rows of two or three samples are not full, which is said once"
    assert "of the places in a step's rows hold tokens" in warnings[0]
    assert tracked_step(tmp_path) == 5 and said[-1].startswith("saved")


def test_sigterm_saves_and_the_same_call_goes_on(tmp_path: Path) -> None:
    """The step after the signal carries it to all ranks, and is read one step late; what was skipped is all saved."""
    config = config_for(tmp_path, train_steps=6, log_interval=6)
    ((_, said),) = run_ranks(run, 1, config, True, 2)
    assert tracked_step(tmp_path) == 4 and said[-1].startswith("saved")
    assert json.loads((iteration_folder(tmp_path, 4) / "progress.json").read_text())["skipped_steps"] == 4
    ((lines, said),) = run_ranks(run, 1, config)
    assert [(line["step"], line["skipped_steps"]) for line in lines] == [(6, 4)] and tracked_step(tmp_path) == 6
    assert any("after step 4" in one for one in said)
    ((whole, _),) = run_ranks(run, 1, replace(config, train=replace(config.train, output=f"{tmp_path}/whole")), True)
    for name in ("aux_loss", "rtd_loss", "clm_loss", "rtd_auc", "replace_rate", "consumed_tokens"):
        assert lines[0][name] == whole[0][name], "the line is of all steps since the one before, saved or not"
    ((_, said),) = run_ranks(run, 1, config)
    assert said[-1] == f"{tmp_path} is finished: all its 6 steps are done"


def test_a_run_whose_steps_are_all_skipped_ends_with_a_remedy(tmp_path: Path) -> None:
    config = config_for(tmp_path, train_steps=MAX_SKIPPED + 1, global_batch_size=1)
    with pytest.raises(Exception, match="50 steps in a row had gradients that are not finite") as caught:
        run_ranks(run, 1, config, True)
    assert "optimizer.lr" in str(caught.value) and UserError.__name__ in str(caught.value)


def run_with(config: Config, spoil: str) -> tuple[list[dict[str, Any]], list[str]]:
    """`run`, with SIGTERM in the first evaluation, or without room for the first save or two."""
    saves = 0

    def no_room(publish: Any, *arguments: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves <= int(spoil):
            raise OSError("no room")
        return publish(*arguments)

    def killing(evaluate: Any, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    owner, name, hook = (module.Step, "evaluate", killing) if spoil == "SIGTERM" else (save, "publish", no_room)
    plain = getattr(owner, name)
    with (
        patch.object(owner, name, lambda *arguments: hook(plain, *arguments)),
        patch.object(small_run, "small_corpus", with_validation),
    ):
        return run(config)


def with_validation(config: Config) -> Corpus:
    """A corpus that is held out from nothing."""
    corpus = small_corpus(config)
    return replace(corpus, validation_shards=corpus.train_shards, validation_index=corpus.train_index)


def test_an_evaluation_stops_when_it_is_asked_to(tmp_path: Path) -> None:
    """The signal comes in the first of its batches: no other is read, no figures are written, the state is saved."""
    config = config_for(tmp_path, log_interval=1, eval_interval=2, eval_samples=90)
    ((lines, said),) = run_ranks(run_with, 1, config, "SIGTERM")
    assert [line["step"] for line in lines] == [1, 2] and tracked_step(tmp_path) == 2
    assert not any("validation" in one for one in said) and said[-1].startswith("saved")


def test_an_evaluation_that_a_stop_amid_a_run_left_out_is_done_by_the_next_start(tmp_path: Path) -> None:
    config = config_for(tmp_path, log_interval=1, eval_interval=2, eval_samples=90)
    run_ranks(run_with, 1, config, "SIGTERM")
    ((lines, _),) = run_ranks(run_with, 1, config, "0")
    steps = [(line["step"], any(name.startswith("validation/") for name in line)) for line in lines]
    assert steps == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (5, False), (5, True)]


def run_without_room(config: Config) -> str:
    """On every rank: what a run says whose first file finds no room."""
    with patch.object(module, "save_config", side_effect=OSError(errno.ENOSPC, "No space left", "run_config.yaml")):
        try:
            run(config)
        except UserError as error:
            return str(error)
    return ""


def test_a_beginning_that_fails_on_the_first_rank_ends_all_with_its_line(tmp_path: Path) -> None:
    said = set(run_ranks(run_without_room, 2, config_for(tmp_path)))
    assert said == {
        "run_config.yaml: no space left on the device; free some or write elsewhere, and run the same command again"
    }


def test_an_evaluation_that_a_stop_behind_the_last_step_left_out_is_done_by_the_next_start(tmp_path: Path) -> None:
    config = config_for(tmp_path, log_interval=1, eval_interval=5, eval_samples=90)
    ((lines, _),) = run_ranks(run_with, 1, config, "SIGTERM")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and tracked_step(tmp_path) == 5
    for _ in range(2):
        ((lines, said),) = run_ranks(run_with, 1, config, "0")
        assert [line["step"] for line in lines if "validation/aux_loss" in line] == [5]
        assert "is finished" in said[-1]


@pytest.mark.parametrize("async_save", [True, False])
def test_a_save_that_fails_is_said_and_the_next_one_counts(tmp_path: Path, async_save: bool) -> None:
    """Beside the training, too, where the second failure in a row is known for sure when the third save begins."""
    config = config_for(tmp_path / "once")
    options = replace(config.checkpoint, save_interval=2, failed_saves=1, async_save=async_save)
    config = replace(config, checkpoint=options)
    ((_, said),) = run_ranks(run_with, 1, config, "1")
    failed, *saved = [one for one in said if "saved" in one]
    assert failed.startswith("warning: not saved: checkpoint") and "has room" in failed and failed.endswith(": no room")
    folders = [iteration_folder(tmp_path / "once", step) for step in (4, 5)]
    assert [one.split(" in ")[0] for one in saved] == [f"saved {folder}" for folder in folders]
    assert ["training stood still" in one for one in saved] == [async_save, False], "the last one is waited for"
    config = replace(config, train=replace(config.train, output=str(tmp_path / "twice"), train_steps=7))
    with pytest.raises(Exception, match="no room"):
        run_ranks(run_with, 1, config, "2")
