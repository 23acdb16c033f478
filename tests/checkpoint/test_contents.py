"""What tools/checkpoint_info.py says of checkpoints is what lies in their files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from metro_megatron.checkpoint.contents import Contents, Stored, differences
from metro_megatron.checkpoint.files import write_integrity
from metro_megatron.commands import checkpoint_info
from metro_megatron.config.file import load_config, save_config
from metro_megatron.errors import UserError
from tests.checkpoint.tensors import read_model_tensors
from tests.checkpoint.test_average import train
from tests.distributed import run_ranks
from tests.parity.small_run import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With checkpoints after one step and after two."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(train, 1, [small_config(train={"output": str(folder)})])
    return folder


def info(load: Path, **options: object) -> int:
    return checkpoint_info.main(checkpoint_info.Options(str(load), **options))  # type: ignore[arg-type]


def test_a_run_folder_is_its_newest_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info(run, verify=True) == 0
    said = capsys.readouterr().out
    weights = read_model_tensors(run / "iter_0000002")
    contents = Contents.open(run)
    assert f"{run / 'iter_0000002'}: " in said and "hashes of its files are as they were written" in said
    assert "model.hidden_size: 64\n" in said and "model.hidden_act" not in said, "what is not the default"
    for name in ("exp_avg", "exp_avg_sq", "param"):
        assert f"{name}.tied.word.weight" in {one.removeprefix("optimizer.state.") for one in contents.tensors}
    assert sum(one.numel for one in contents.tensors.values()) == 4 * sum(one.numel() for one in weights.values())
    for name, tensor in weights.items():
        stored = contents.tensors[name]
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype) and stored.read().equal(tensor)


def test_the_tree_adds_up() -> None:
    shapes = {"a.b.weight": (2, 500), "a.b.bias": (3,), "a.c.d": (), "e.f.g": (4,), "e.f.h.i": (4,)}
    tensors = {name: Stored(shape, torch.float32, lambda: torch.zeros(1)) for name, shape in shapes.items()}
    assert list(checkpoint_info.tree(tensors)) == [
        "a  3 tensors, 1,004 numbers, 4.02 kB",
        "  b  2 tensors, 1,003 numbers, 4.01 kB",
        "    weight  [2 x 500] float32, 4 kB",
        "    bias  [3] float32, 12 bytes",
        "  c.d  [one number] float32, 4 bytes",
        "e.f  2 tensors, 8 numbers, 32 bytes",
        "  g  [4] float32, 16 bytes",
        "  h.i  [4] float32, 16 bytes",
    ]
    assert list(checkpoint_info.tree(tensors, depth=1)) == [
        "a  3 tensors, 1,004 numbers, 4.02 kB",
        "e.f  2 tensors, 8 numbers, 32 bytes",
    ]


def test_two_checkpoints_differ_in_what_was_trained_and_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = run / "iter_0000001", shutil.copytree(run / "iter_0000002", tmp_path / "second")
    assert info(second, against=str(run)) == 0
    contents = Contents.open(first)
    assert (
        f"{len(contents.tensors)} of {len(contents.tensors)} tensors are equal bit for bit" in capsys.readouterr().out
    )
    config = load_config(second / "run_config.yaml")
    save_config(replace(config, train=replace(config.train, seed=9)), second / "run_config.yaml")
    write_integrity(second)
    assert info(first, against=str(second)) == 1
    assert "  train.seed: 1 | 9\n" in capsys.readouterr().out
    found = {one.name: one for one in differences(contents, Contents.open(second))}
    before, after = read_model_tensors(first), read_model_tensors(second)
    assert {name for name in found if name in before} == {
        name for name in before if not before[name].equal(after[name])
    }
    for name, tensor in before.items():
        if name in found:
            apart = (tensor.double() - after[name].double()).abs()
            assert found[name].largest == apart.max() and found[name].share == pytest.approx(
                float((apart > 0).double().mean())
            )
    assert len(found) > len(before), "moments, too"


@pytest.mark.parametrize(
    ("damage", "verify"),
    [("flip", True), ("flip", False), ("cut", False), ("integrity.json", False), ("run_config.yaml", False)],
)
def test_damage_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, verify: bool
) -> None:
    """A flipped bit where hashes are compared, another length always, and a file that is not there."""
    folder = shutil.copytree(run / "iter_0000001", tmp_path / "iter_0000001")
    is_missing = damage not in ("flip", "cut")
    victim = folder / damage if is_missing else next(folder.glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if is_missing:
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "flip" else content[:-1])
    is_seen = verify or damage != "flip"
    assert info(folder, verify=verify) == is_seen
    assert (f"{victim}: {'missing' if is_missing else 'damaged'}" in capsys.readouterr().out) == is_seen


def test_damage_that_keeps_tensors_from_being_compared_is_named(run: Path, tmp_path: Path) -> None:
    """Not numbers, which are another's then, but what says where they lie."""
    folder = shutil.copytree(run / "iter_0000001", tmp_path / "iter_0000001")
    victim = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes().replace(b"PK\3\4", b"PK\3\5"))
    with pytest.raises(UserError, match=f"{victim}: damaged, its contents"):
        info(folder, against=str(run / "iter_0000001"))


def test_an_exported_folder_and_what_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a.b": torch.zeros(2, 3), "a.c": torch.ones(3, dtype=torch.bfloat16)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 3}))
    assert info(folder) == 0
    said = capsys.readouterr().out
    assert "2 tensors, 9 numbers, 30 bytes" in said and "  b  [2 x 3] float32, 24 bytes\n" in said
    assert "hidden_size: 3" in said and "no integrity.json" in said
    with pytest.raises(UserError, match="neither a checkpoint"):
        info(tmp_path)


def test_a_damaged_progress_is_named(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "iter_0000001", tmp_path / "iter_0000001"))
    for content in ('{"step": ', "[1, 2]"):
        (folder / "progress.json").write_text(content)
        with pytest.raises(UserError, match="progress.json: damaged"):
            info(folder)
