"""Averages of checkpoints equal numpy's, and are checkpoints of weights that become models and start no run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from metro_megatron.checkpoint.average import Average, Part, Source, newest, normalized
from metro_megatron.checkpoint.files import write_integrity
from metro_megatron.checkpoint.read import StoredModel
from metro_megatron.checkpoint.resume import refuse_other_run
from metro_megatron.checkpoint.save import Checkpoints
from metro_megatron.commands import average_checkpoints, convert_checkpoint
from metro_megatron.config.file import load_config, save_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from tests.checkpoint.tensors import read_model_tensors
from tests.distributed import run_ranks
from tests.hf.pair import write_tokenizer
from tests.parity.small_run import run_steps, small_config, start


def train(configs: list[Config]) -> None:
    """Two steps of each run, saved after both."""
    for config in configs:
        trainer = start(config)
        try:
            for step in range(2):
                run_steps(trainer, step, step + 1)
                trainer.homes.fetch_parameters()
                checkpoints = Checkpoints(config, trainer.layout, trainer.pair, trainer.optimizer)
                checkpoints.save(step + 1, {"consumed_samples": 24})
        finally:
            trainer.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one architecture: on two tensor-parallel ranks in fp32, on two data-parallel ones in bf16."""
    folders = [tmp_path_factory.mktemp(name) for name in ("tensor", "data")]
    for folder in folders:
        write_tokenizer(folder / "tokenizer")
    tensor = small_config(train={"output": str(folders[0])}, parallel={"tensor_model_parallel_size": 2})
    data = small_config(train={"output": str(folders[1]), "seed": 5, "precision": "bf16"})
    run_ranks(train, 2, [tensor, data])
    return folders


def average(folders: list[Path], weights: list[float], output: Path, part: Part = "pair") -> Path:
    shares = normalized(weights, len(folders))
    Average([Source.open(*pair) for pair in zip(folders, shares, strict=True)], part).write(output)
    return output


def test_an_average_of_two_layouts_and_formats_is_numpys(runs: list[Path], tmp_path: Path) -> None:
    folders = [*newest(runs[0], 2), *newest(runs[1], 1)]
    weights = [1.0, 2.5, 4.0]
    written = read_model_tensors(average(folders, weights, tmp_path / "average"))
    sources = [read_model_tensors(folder) for folder in folders]
    assert sources[2]["main.rtd_head.weight"].dtype == torch.bfloat16 and written.keys() == sources[0].keys()
    for name, tensor in written.items():
        arrays = [source[name].double().numpy() for source in sources]
        expected = sum(np.float64(w / 7.5) * array for w, array in zip(weights, arrays, strict=True))
        np.testing.assert_array_equal(tensor.numpy(), expected.astype(np.float32), strict=True)
        assert not np.array_equal(arrays[0], arrays[1]) or name.endswith("bias") or "norm" in name, name


def test_the_average_of_equal_checkpoints_is_the_checkpoint(runs: list[Path], tmp_path: Path) -> None:
    (folder,) = newest(runs[0], 1)
    original = read_model_tensors(folder)
    for weights in ([3.0], [1.0, 1.0], [1.0, 2.0, 4.0]):
        written = read_model_tensors(average([folder] * len(weights), weights, tmp_path / "average"))
        for name, tensor in original.items():
            assert torch.equal(written[name].view(torch.int32), tensor.view(torch.int32)), name


def convert(load: Path, output: Path) -> None:
    convert_checkpoint.main(convert_checkpoint.Options(str(load), str(output)))


def convert_both(pair: Path, main: Path) -> None:
    """On a lone rank, which the comparison needs anyway."""
    for folder in (pair, main):
        convert(folder, folder.with_name(f"{folder.name}.hf"))


def test_averages_become_models_that_equal_the_trainer(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {}
    for part in ("pair", "main"):
        folders[part] = tmp_path / part
        options = average_checkpoints.Options([str(run) for run in runs], str(folders[part]), weights=[1, 3], part=part)
        average_checkpoints.main(options)
        assert f"--load {folders[part]} --output DIR" in capsys.readouterr().out
    run_ranks(convert_both, 1, folders["pair"], folders["main"])
    models = {part: tmp_path / f"{part}.hf" for part in folders}
    cards = {part: (model / "README.md").read_text() for part, model in models.items()}
    assert "| average of | 2 checkpoints, auxiliary and main |" in cards["pair"]
    assert "| average of | 2 checkpoints, main alone |" in cards["main"]
    assert "(seed 5), weight 0.75, SHA-256 of integrity.json " in cards["pair"]
    assert "train.seed, " in cards["pair"] and "largest difference to the trainer's outputs" in cards["main"]
    weights = {part: load_file(model / "model.safetensors") for part, model in models.items()}
    assert weights["main"] and not any("auxiliary" in name for name in weights["main"])
    for name, tensor in weights["main"].items():
        assert torch.equal(tensor, weights["pair"][name]), name


def test_no_run_continues_from_an_average(runs: list[Path], tmp_path: Path) -> None:
    folder = average(newest(runs[0], 2), [], tmp_path / "iter_0000002")
    with pytest.raises(UserError, match="neither moments nor a place in the data"):
        refuse_other_run(folder, load_config(folder / "run_config.yaml"))
    with pytest.raises(UserError, match="an average itself"):
        Source.open(folder, 1.0)


def test_damaged_and_diverged_checkpoints_are_refused(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(runs[0], tmp_path / "run")
    path = copy / "iter_0000002" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    options = average_checkpoints.Options([str(copy)], str(tmp_path / "average"), last=2)
    with pytest.raises(UserError, match="__0_0.distcp: damaged"):
        average_checkpoints.main(options)
    assert "iter_0000002" not in capsys.readouterr().out, "nothing is said to be whole that is not"
    read = StoredModel.read
    monkeypatch.setattr(StoredModel, "read", lambda *given: {k: v / 0 for k, v in read(*given).items()})
    with pytest.raises(UserError, match=r"tensor aux\S+ is not finite.*leave it out"):
        average(newest(runs[0], 2), [], tmp_path / "average")
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_every_difference_of_architectures_is_named(runs: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0], tmp_path / "other") / "iter_0000002"
    config = load_config(folder / "run_config.yaml")
    other = replace(config, model=replace(config.model, num_attention_heads=2, relative_bucket="t5"))
    save_config(other, folder / "run_config.yaml")
    write_integrity(folder)
    average_of_main = average(newest(runs[0], 1), [], tmp_path / "average", "main")
    record = json.loads((average_of_main / "average.json").read_text())
    assert (record["part"], record["differing_options"], len(record["sources"])) == ("main", [], 1)
    sources = [Source.open(newest(runs[0], 1)[0], 0.5), Source.open(folder, 0.5)]
    sources[1].model.stored.pop("main.rtd_head.bias")
    with pytest.raises(UserError) as caught:
        Average(sources, "pair")
    first, found = newest(runs[0], 1)[0], caught.value.problems
    assert f"{folder}: model.num_attention_heads is 2, in {first} 4" in found
    assert f"{folder}: model.relative_bucket is t5, in {first} coco" in found
    assert f"{folder}: tensor main.rtd_head.bias is missing, in {first} (1,)" in found and len(found) == 4


def test_mains_of_pairs_with_other_auxiliaries_are_averaged(runs: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0], tmp_path / "other") / "iter_0000002"
    config = load_config(folder / "run_config.yaml")
    save_config(replace(config, model=replace(config.model, auxiliary_num_layers=1)), folder / "run_config.yaml")
    write_integrity(folder)
    sources = [Source.open(newest(runs[0], 1)[0], 0.5), Source.open(folder, 0.5)]
    sources[1].model.stored.pop("aux.head.dense.weight")
    assert all(not name.startswith("aux.") for name in Average(sources, "main").names)
    with pytest.raises(UserError) as caught:
        Average(sources, "pair")
    assert len(caught.value.problems) == 3


def test_shares_of_weights_of_any_size() -> None:
    assert normalized([1e308, 1e308], 2) == [0.5, 0.5] and normalized([3e-300, 1e-300], 2) == pytest.approx(
        [0.75, 0.25]
    )
    with pytest.raises(UserError, match=r"--weights: 1e-300 is nothing beside 1e\+308; leave that checkpoint out"):
        normalized([1e-300, 1e308], 2)


def test_mistakes_about_weights_and_counts(runs: list[Path]) -> None:
    beside = average_checkpoints.Options([str(runs[0])], str(runs[0] / "iter_0000099"), last=2)
    with pytest.raises(UserError, match="is among the checkpoints of a run, which would go on from it; give another"):
        average_checkpoints.main(beside)
    with pytest.raises(UserError) as caught:
        normalized([1.0, 0.0, float("nan")], 2)
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "--weights: 0 is not positive and finite",
        "--weights: nan is not positive and finite",
        "--weights: 3 numbers for 2 checkpoints",
    ]
    with pytest.raises(UserError, match="--last 3: .* has 2 checkpoints"):
        newest(runs[0], 3)
    with pytest.raises(UserError, match="--last 2: is of one run, --load names 2 folders"):
        average_checkpoints.main(average_checkpoints.Options([str(run) for run in runs], "x", last=2))
