"""What a sweep asks for, and what makes another run of a run."""

import shutil
from pathlib import Path

import pytest

from metro_megatron.cli.options import options_of
from metro_megatron.commands import finetune
from metro_megatron.errors import UserError
from metro_megatron.finetune.sweep.plan import PATHS, hashed, read_plan
from tests.finetune.sweep.test_running import plan_of


def test_all_combinations_with_seeds_outermost(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--learning_rate", "1e-5", "3e-5", "--from_scratch", "false", "true", "--seed", "1", "2")
    assert plan.varied == ("learning_rate", "seed", "from_scratch")
    names = ("seed", "learning_rate", "from_scratch")
    assert [tuple(run.values[name] for name in names) for run in plan.runs] == [
        (seed, rate, scratch) for seed in (1, 2) for rate in (1e-5, 3e-5) for scratch in (False, True)
    ]
    assert plan.runs[1].argv[-6:] == ["--learning_rate", "1e-05", "--seed", "1", "--from_scratch", "true"]
    assert plan.runs[0].values["batch_size"] == 32 and "batch_size" not in plan.runs[0].given


def test_a_digest_follows_contents_and_options_not_places(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, moved = (plan_of(tmp_path / name, "--seed", "1").runs[0] for name in "ab")
    assert first.digest == moved.digest
    assert plan_of(tmp_path / "a", "--seed", "1", "--learning_rate", "3e-5").runs[0].digest == first.digest
    digests = {first.digest, plan_of(tmp_path / "a", "--seed", "2").runs[0].digest}
    folder = tmp_path / "b" / "model"
    (folder / "README.md").write_text("a card")
    assert plan_of(tmp_path / "b", "--seed", "1").runs[0].digest == first.digest
    (folder / "model.safetensors").write_text("weights")
    digests.add(plan_of(tmp_path / "b", "--seed", "1").runs[0].digest)
    (folder / "model.safetensors").write_text("others")
    digests.add(plan_of(tmp_path / "b", "--seed", "1").runs[0].digest)
    assert len(digests) == 4
    assert set(PATHS) <= {option.leaf for option in options_of(finetune.Options)}


def test_paths_that_hold_the_same_are_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--seed", "1")
    copies = tmp_path / "copy", tmp_path / "copy.csv"
    shutil.copytree(tmp_path / "model", copies[0])
    (copies[0] / "README.md").write_text("another card")
    shutil.copy(tmp_path / "train.csv", copies[1])
    given = plan.runs[0].given
    tokens = [word for name in ("task", "validation_file") for word in (f"--{name}", given[name])]
    tokens += ["--model", given["model"], str(copies[0]), "--train_file", given["train_file"], str(copies[1])]
    with pytest.raises(UserError) as caught:
        hashed(read_plan(tokens, finetune.Options))
    assert caught.value.problems == [
        f"--model {given['model']} {copies[0]}: these hold the same; give one of them",
        f"--train_file {given['train_file']} {copies[1]}: these hold the same; give one of them",
    ]


def test_mistakes_are_named_together() -> None:
    tokens = ["--task", "classification", "--seed", "1", "1", "--epochs", "0", "--learning_rat", "1", "--output", "o"]
    with pytest.raises(UserError) as caught:
        read_plan(tokens, finetune.Options)
    problems = "\n".join(caught.value.problems)
    assert "--learning_rat: no such option; did you mean --learning_rate?" in problems
    assert "--epochs is 0, must be at least 1" in problems and "--seed has 1 twice" in problems
    assert "--output: no such option" in problems and "--model: required, but not given" in problems
