"""Checkpoints of megatron-core, read in this process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metro_megatron.checkpoint.read import find_iteration
from metro_megatron.errors import UserError
from tests.checkpoint.tensors import read_model_tensors
from tests.distributed import run_ranks
from tests.hf.pair import trainer_tensors
from tests.hf.saved import save_on_this_rank


@pytest.fixture(scope="module")
def iteration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "iter_0000007"
    run_ranks(save_on_this_rank, 1, folder)
    return folder


def test_tensors_come_back_whole_and_exact(iteration: Path) -> None:
    loaded = read_model_tensors(iteration)
    expected = trainer_tensors()
    assert loaded.keys() == expected.keys(), "no optimizer state, no extra state"
    for name, tensor in expected.items():
        if name.startswith("aux.head"):
            tensor = tensor.bfloat16()
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_reading_needs_neither_megatron_nor_a_process_group(iteration: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import metro_megatron.hf.verify, metro_megatron.hf.export; "
        "import metro_megatron.finetune.run; from metro_megatron.checkpoint.read import StoredModel; "
        f"model = StoredModel.open(Path({str(iteration)!r})); model.read(model.stored); "
        "import torch.distributed as d; assert not d.is_initialized(); "
        "assert not [m for m in sys.modules if m.startswith('megatron')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, cwd=Path(__file__).parents[2])


def test_damage_is_found_before_reading(iteration: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(iteration, tmp_path / iteration.name)
    path = copy / "__0_1.distcp"
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 4
    path.write_bytes(contents)
    with pytest.raises(UserError, match=r"__0_1\.distcp: damaged"):
        read_model_tensors(copy)


def test_run_folders_lead_to_their_newest_checkpoint(iteration: Path, tmp_path: Path) -> None:
    assert find_iteration(iteration) == iteration
    with pytest.raises(UserError, match="neither a checkpoint"):
        find_iteration(tmp_path)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for text in ("8", "", "release", "-7", "../x", "²"):
        tracker.write_text(text)
        with pytest.raises(UserError, match="neither a checkpoint"):
            find_iteration(tmp_path)
    for name in ("iter_0000008", "iter_10000000", "iter_9999999"):
        (tmp_path / name).mkdir()
    assert find_iteration(tmp_path) == tmp_path / "iter_10000000", "the newest, as a number, where nothing says so"
    tracker.write_text("8\n")
    assert find_iteration(tmp_path) == tmp_path / "iter_0000008"
