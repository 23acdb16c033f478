"""A run in phases: what each step trains on and at what rate, and that it is resumed bit for bit around a border."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metro_megatron.checkpoint.files import TRACKER, iteration_folder
from metro_megatron.checkpoint.resume import beginning
from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import Config
from metro_megatron.data.loader import PretrainingData
from metro_megatron.errors import UserError
from metro_megatron.files import replace_text
from metro_megatron.plan.flops import Amount, model_flops
from tests.checkpoint.test_branch import config_for, figures
from tests.distributed import run_ranks
from tests.parity.small_run import small_corpus
from tests.train.test_trainer import run

LATER = [Phase(3, seq_length=24, mask_probability=0.3, lr_factor=0.5), Phase(5, mask_probability=0.1)]
Lines = list[dict[str, Any]]


def phased(folder: Path, phases: list[Phase], **train: Any) -> Config:
    config = config_for(folder, {"lr_decay_steps": 0}, phases=phases, **train)
    return Config(**{**vars(config), "checkpoint": type(config.checkpoint)(save_interval=1, keep_last=0)})


def whole_and_resumed(config: Config, steps: list[int]) -> list[Lines]:
    """Figures of the whole run, then of the same run once more from behind each of the steps."""
    found = [figures(run(config)[0])]
    for step in steps:
        replace_text(Path(config.train.output) / TRACKER, f"{step}\n")  # every rank, which then wait for each other
        found.append(figures(run(config)[0]))
    return found


def test_a_run_in_phases_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """At a border, where the next phase begins, and behind it; with dropout."""
    config = phased(tmp_path, LATER)
    ((whole, *resumed),) = run_ranks(whole_and_resumed, 1, config, [3, 4])
    assert [line["step"] for line in whole] == list(range(1, 7))
    assert resumed == [whole, whole]
    assert [line["learning_rate"] for line in whole] == [5e-4, 1e-3, 1e-3, 5e-4, 5e-4, 1e-3]
    corpus = small_corpus(config)
    data = PretrainingData(corpus.train_index, corpus.train_shards, config, phase_indices=corpus.phase_indices)
    batches = list(data.prefetch(0, 6, 0))
    assert [line["consumed_samples"] for line in whole] == [batch.end for batch in batches]
    masked = [batch.num_masked / batch.num_tokens for batch in batches]
    assert masked == pytest.approx([0.15] * 3 + [0.3] * 2 + [0.1], abs=0.03)
    progress = json.loads((iteration_folder(tmp_path, 4) / "progress.json").read_text())
    assert progress["phase_begins"] == [0, batches[2].end]


@pytest.mark.long
def test_two_ranks_train_in_the_same_phases(tmp_path: Path) -> None:
    """And are resumed bit for bit too, before, at and behind borders."""
    (alone,) = run_ranks(whole_and_resumed, 1, phased(tmp_path / "alone", LATER), [])[0]
    whole, *resumed = run_ranks(whole_and_resumed, 2, phased(tmp_path / "ranks", LATER), [2, 3, 4, 5])[0]
    assert resumed == [whole] * 4
    for one, other in zip(whole, alone, strict=True):
        assert one["consumed_samples"] == other["consumed_samples"] and one["learning_rate"] == other["learning_rate"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_phases_before_a_branching_are_kept(tmp_path: Path) -> None:
    run_ranks(run, 1, phased(tmp_path / "parent", LATER, train_steps=4))
    point = str(iteration_folder(tmp_path / "parent", 4))
    for phases in (LATER, LATER[:1], [LATER[0], Phase(4, lr_factor=3.0)]):
        assert beginning(phased(tmp_path / "new", phases, branch_from=point)) == Path(point)
    for phases in ([], LATER[1:], [Phase(2, lr_factor=3.0), *LATER], [Phase("50%", 24, [], 0.3, 0.5)]):
        with pytest.raises(UserError, match="keep those, their starts in steps"):
            beginning(phased(tmp_path / "new", phases, branch_from=point, train_steps=8))
    with pytest.raises(UserError, match=r"train.skip_steps is \['4-5'\], but up to step 4 .* made with \[\]"):
        beginning(phased(tmp_path / "new", LATER, branch_from=point, train_steps=6, skip_steps=["4-5"]))
    branch = phased(tmp_path / "new", LATER, branch_from=point, train_steps=6, log_interval=2)
    ((lines, _),) = run_ranks(run, 1, branch)
    assert [line["learning_rate"] for line in lines] == [1e-3]
    # The parent's steps, and the line's, each with its phase.
    corpus = small_corpus(branch)
    data = PretrainingData(corpus.train_index, corpus.train_shards, branch, phase_indices=corpus.phase_indices)
    flops, begin, ends = [], 0, []
    for batch, phase in zip(data.prefetch(0, 6, 0), [0, 0, 0, 1, 1, 2], strict=True):
        amount = Amount(batch.num_tokens, batch.num_squares, batch.end - begin)
        flops.append(model_flops(branch.by_phase[phase], amount))
        begin = batch.end
        ends.append(begin)
    progress = json.loads((iteration_folder(tmp_path / "new", 6) / "progress.json").read_text())
    assert progress["flops"] == sum(flops) and progress["branch"]["consumed_samples"] == ends[3]
    measured = lines[0]["tflops_per_gpu"] * 1e12 * lines[0]["seconds_per_step"] * 2
    assert measured == pytest.approx(flops[4] + flops[5], rel=1e-9)
