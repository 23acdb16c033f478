"""What a resumed run may be told anew, and what would make it another run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from metro_megatron.checkpoint.files import TRACKER, file_entries
from metro_megatron.checkpoint.resume import beginning, config_differences, refuse_other_run
from metro_megatron.config.file import save_config
from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import CheckpointConfig, Config, DataConfig, ParallelConfig
from metro_megatron.errors import UserError

SAVED = Config()


def test_layout_rows_reporting_and_paths_may_change() -> None:
    data = DataConfig(train=["elsewhere"], micro_batch_tokens=1024, row_format="padded", prefetch_steps=0)
    train = replace(SAVED.train, output="moved", log_interval=1, eval_samples=7, device="cpu", fused="reference")
    other = replace(
        SAVED,
        parallel=ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, recompute="full"),
        checkpoint=CheckpointConfig(save_interval=5, keep_last=1),
        data=data,
        train=train,
    )
    assert config_differences(SAVED, other) == []


def test_everything_else_is_refused_at_once_with_both_values(tmp_path: Path) -> None:
    save_config(SAVED, tmp_path / "run_config.yaml")
    (tmp_path / "progress.json").write_text('{"step": 5}')
    other = replace(
        SAVED, optimizer=replace(SAVED.optimizer, lr=1.0), train=replace(SAVED.train, seed=9), data=DataConfig()
    )
    with pytest.raises(UserError) as caught:
        refuse_other_run(tmp_path, other)
    found = caught.value.problems
    assert found[:2] == [
        "optimizer.lr is 1.0, but the checkpoint was made with 0.0005 (train.override may name it)",
        "train.seed is 9, but the checkpoint was made with 1",
    ]
    assert len(found) == 3 and "choose another train.output" in found[2]


def test_phases_that_have_begun_stay_where_they_began(tmp_path: Path) -> None:
    """A longer run would move the start of a phase in percent behind the checkpoint."""
    phased = replace(SAVED, train=replace(SAVED.train, train_steps=10, phases=[Phase(start="50%", lr_factor=0.5)]))
    save_config(phased, tmp_path / "run_config.yaml")
    (tmp_path / "progress.json").write_text('{"step": 6}')
    longer = replace(phased, train=replace(phased.train, train_steps=20, override=["train.train_steps"]))
    with pytest.raises(UserError, match="keep those, their starts in steps"):
        refuse_other_run(tmp_path, longer)
    in_steps = [Phase(start=5, lr_factor=0.5)]
    save_config(replace(phased, train=replace(phased.train, phases=in_steps)), tmp_path / "run_config.yaml")
    refuse_other_run(tmp_path, replace(longer, train=replace(longer.train, phases=in_steps)))


def test_a_first_look_takes_no_value_from_a_damaged_text(tmp_path: Path) -> None:
    """A digit of the newest checkpoint's step, or of its options, would make it another run's."""
    for step in (3, 6):
        folder = tmp_path / f"iter_{step:07d}"
        folder.mkdir()
        save_config(SAVED, folder / "run_config.yaml")
        (folder / "progress.json").write_text(f'{{"step": {step}}}')
        texts = file_entries([folder / "run_config.yaml", folder / "progress.json"])
        (folder / "integrity.json").write_text(json.dumps({"files": texts}))
    config = replace(SAVED, train=replace(SAVED.train, output=str(tmp_path)))
    assert beginning(config) == folder
    (folder / "progress.json").write_text('{"step": 999999999}')
    assert beginning(config) == tmp_path / "iter_0000003"
    (tmp_path / "iter_0000003" / "run_config.yaml").write_text("train:\n  seed: 9\n")
    with pytest.raises(UserError, match=r"(?s)progress.json: missing or damaged.*run_config.yaml: missing or damaged"):
        beginning(config)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_by_itself(tmp_path: Path) -> None:
    config = replace(SAVED, train=replace(SAVED.train, output=str(tmp_path)))
    (tmp_path / "metrics.jsonl").touch()
    assert beginning(config) is None
    (tmp_path / TRACKER).write_text("500\n")
    with pytest.raises(UserError, match="was saved, but none of its checkpoints is there: bring one back, or remove"):
        beginning(config)
