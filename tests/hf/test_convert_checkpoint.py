"""tools/convert_checkpoint.py on the folder of a real, if short, run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from metro_megatron.checkpoint.save import Checkpoints
from metro_megatron.commands.convert_checkpoint import Options, main
from metro_megatron.config.schema import Config
from tests.distributed import run_ranks
from tests.hf.pair import VARIANTS, write_tokenizer
from tests.parity.small_run import run_steps, small_config, start

ROOT = Path(__file__).parents[2]


TRAINED = ("METRO", "METRO's baseline", "nothing shared, TUPE without relative positions or reset, pre-LN")
WEIGHTS = {"rtd_weight": 20.0, "clm_weight": 2.0}
"""Of losses; an export has them, too."""


def train_two_steps(configs: list[Config]) -> None:
    for config in configs:
        trainer = start(config)
        try:
            run_steps(trainer, 0, 2)
            trainer.homes.fetch_parameters()
            Checkpoints(config, trainer.layout, trainer.pair, trainer.optimizer).save(2, {"consumed_samples": 48})
        finally:
            trainer.close()


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By variant, from two tensor-parallel ranks."""
    root = tmp_path_factory.mktemp("runs")
    folders = {name: root / str(number) for number, name in enumerate(TRAINED)}
    parallel = {"tensor_model_parallel_size": 2}
    for folder in folders.values():
        write_tokenizer(folder / "tokenizer")
    configs = [
        small_config(train={"output": str(folder)}, model=VARIANTS[name], parallel=parallel, objective=WEIGHTS)
        for name, folder in folders.items()
    ]
    run_ranks(train_two_steps, 2, configs)
    return folders


@pytest.fixture
def run_folder(run_folders: dict[str, Path]) -> Path:
    return run_folders["METRO"]


def convert_all(runs: list[Path]) -> None:
    """On a lone rank, which the comparison needs anyway."""
    for run in runs:
        main(Options(load=str(run), output=str(run / "hf")))


@pytest.fixture(scope="module")
def variant_folders(run_folders: dict[str, Path]) -> dict[str, Path]:
    """Exports; what differs from the trainer would have been refused."""
    variants = {name: folder for name, folder in run_folders.items() if name != "METRO"}
    run_ranks(convert_all, 1, list(variants.values()))
    return {name: folder / "hf" for name, folder in variants.items()}


def test_variants_become_folders_equal_to_the_trainer(variant_folders: dict[str, Path]) -> None:
    for name, folder in variant_folders.items():
        assert "largest difference to the trainer's outputs" in (folder / "README.md").read_text()
        settings = json.loads((folder / "config.json").read_text())
        assert VARIANTS[name].items() <= settings.items() and WEIGHTS.items() <= settings.items()


def convert(load: Path, output: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tools.convert_checkpoint", "--load", str(load), "--output", str(output)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=200, cwd=ROOT)


def test_a_run_becomes_a_folder_equal_to_the_trainer(run_folder: Path, tmp_path: Path) -> None:
    done = convert(run_folder, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    figures = done.stdout.split("over 85 tokens: ")[1].splitlines()[0]
    differences = {name: float(value) for name, value in (figure.split() for figure in figures.split(", "))}
    assert differences.keys() == {"hidden", "mlm", "rtd", "clm"}
    assert 0 < max(differences.values()) < 1e-5
    assert f"tools/finetune.py --model {tmp_path / 'hf'}" in done.stdout
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| checkpoint | iter_0000002 |" in card
    assert "| consumed samples | 48 |" in card
    assert figures in card


def test_a_damaged_checkpoint_is_refused(run_folder: Path, tmp_path: Path) -> None:
    path = run_folder / "iter_0000002" / "__0_0.distcp"
    contents = bytearray(path.read_bytes())
    contents[1000] ^= 1
    path.write_bytes(contents)
    try:
        done = convert(run_folder / "iter_0000002", tmp_path / "hf")
    finally:
        contents[1000] ^= 1
        path.write_bytes(contents)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: damaged")
    assert not list(tmp_path.iterdir())
