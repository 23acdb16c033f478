"""A run that begins with weights of others: in any layout, bit for bit, or not at all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from metro_megatron.checkpoint.files import iteration_folder
from metro_megatron.checkpoint.save import Checkpoints
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.hf.export import exported_model, write_hf_folder
from metro_megatron.hf.modeling_metro import MetroForReplacedTokenDetection, MetroModel
from metro_megatron.hf.weights import hf_state_dict
from metro_megatron.train.build import initial_weights
from metro_megatron.train.initial_weights import InitialWeights, open_pretrained
from metro_megatron.train.trainer import Trainer
from tests.checkpoint.tensors import read_model_tensors
from tests.distributed import run_ranks
from tests.hf.pair import write_tokenizer
from tests.parity.small_run import Figures, run_steps, small_config, small_corpus, start, whole_weights

LINEAR: dict[str, Any] = {"lr": 1e4, "lr_warmup_steps": 0, "adam_eps": 1e4, "weight_decay": 0.0, "clip_grad": 0.0}
"""With so large an epsilon Adam's first step is the gradient itself."""
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
)
"""Of four ranks."""


@dataclass
class Begun:
    """A run's first weights, and what one step made of them."""

    weights: dict[str, Tensor]
    figures: Figures
    change: dict[str, Tensor]


def begin(config: Config) -> Begun:
    trainer = Trainer(config, small_corpus(config), torch.device("cpu"))
    try:
        weights = whole_weights(trainer)
        (figures,), _ = run_steps(trainer, 0, 1)
        trainer.homes.fetch_parameters()
        after = whole_weights(trainer)
        return Begun(weights, figures, {name: after[name] - tensor for name, tensor in weights.items()})
    finally:
        trainer.close()


def save_trained(config: Config) -> dict[str, Tensor]:
    """Of two steps, into a run folder; returns the weights."""
    trainer = start(config)
    try:
        run_steps(trainer, 0, 2)
        trainer.homes.fetch_parameters()
        Checkpoints(config, trainer.layout, trainer.pair, trainer.optimizer).save(2, {"step": 2})
        return whole_weights(trainer)
    finally:
        trainer.close()


def run_config(*folders: Path, **concerns: dict[str, Any]) -> Config:
    train = {"initialize_from": list(map(str, folders)), **concerns.pop("train", {})}
    return small_config(train=train, optimizer=LINEAR, **concerns)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two steps and its export."""
    root = tmp_path_factory.mktemp("initial")
    tokenizer = write_tokenizer(root / "run" / "tokenizer")
    config = small_config(train={"output": str(root / "run")})
    (weights,) = run_ranks(save_trained, 1, config)
    write_hf_folder(root / "hf", weights, config.model, tokenizer, {})
    return {"run": root / "run", "hf": root / "hf", "tokenizer": tokenizer}


def begin_alone(configs: list[Config]) -> list[Begun]:
    return [begin(config) for config in configs]


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> list[Begun]:
    """One process on the checkpoint, and on its export."""
    checkpoint = iteration_folder(folders["run"], 2)
    return run_ranks(begin_alone, 1, [run_config(checkpoint), run_config(folders["hf"])])[0]


def test_an_export_begins_as_its_checkpoint(alone: list[Begun]) -> None:
    of_checkpoint, of_folder = alone
    assert of_folder.figures == of_checkpoint.figures
    for name, tensor in of_checkpoint.weights.items():
        assert tensor.equal(of_folder.weights[name]) and of_checkpoint.change[name].equal(of_folder.change[name])


@pytest.mark.parametrize("fresh", ["main", "auxiliary"])
def test_without_one_encoder_a_checkpoint_gives_what_its_export_gives(folders: dict[str, Path], fresh: str) -> None:
    """The token table, which both share, among it."""
    given = []
    for folder in (folders["run"], folders["hf"]):
        initial = InitialWeights.open(run_config(folder, train={"initialize_fresh": [fresh]}), folders["tokenizer"])
        initial.refuse_misfits()
        given.append(dict(initial.tensors))
    of_checkpoint, of_folder = given
    assert of_checkpoint.keys() == of_folder.keys() and "tied.word.weight" in of_folder
    assert all(tensor.equal(of_folder[name]) for name, tensor in of_checkpoint.items())
    apart = run_config(folders["run"], model={"shared_embeddings": "none"})
    InitialWeights.open(apart, folders["tokenizer"]).refuse_misfits()


@pytest.mark.parametrize("number", [0, *(pytest.param(one, marks=pytest.mark.long) for one in (1, 2))])
def test_other_layouts_begin_with_every_bit_and_the_same_loss_and_gradients(
    folders: dict[str, Path], alone: list[Begun], number: int
) -> None:
    """Exported, begun on four ranks, exported again: the same tensors."""
    spread = run_ranks(begin, 4, run_config(folders["hf"], parallel=LAYOUTS[number]))[0]
    exported = load_file(folders["hf"] / "model.safetensors")
    again = hf_state_dict(spread.weights, small_config().model)
    assert exported.keys() < again.keys()
    assert all(again[name].equal(tensor) for name, tensor in exported.items())
    assert all(tensor.equal(alone[0].weights[name]) for name, tensor in spread.weights.items())
    for name in ("aux_loss", "rtd_loss", "clm_loss"):
        assert spread.figures[name] == pytest.approx(alone[0].figures[name], rel=1e-6)
    for name, expected in alone[0].change.items():
        error = (spread.change[name] - expected).norm()
        assert error < 1e-4 * expected.norm() + 1e-6, (name, error)  # the weights' last bits


def masters(config: Config) -> list[tuple[Tensor, Tensor]]:
    """Parameters of a lone process and what its optimizer has of them."""
    trainer = Trainer(config, small_corpus(config), torch.device("cpu"))
    try:
        pairs = []
        for one in trainer.optimizer.both:
            models = (*one.model_float16_groups, *one.model_fp32_groups)
            groups = zip(models, (*one.shard_fp32_from_float16_groups, *one.shard_fp32_groups), strict=True)
            for parameters, shards in groups:
                pairs += [(p.detach().clone(), m.detach().clone()) for p, m in zip(parameters, shards, strict=True)]
        return pairs
    finally:
        trainer.close()


def test_masters_have_the_values_that_weights_were_rounded_from(folders: dict[str, Path]) -> None:
    (pairs,) = run_ranks(masters, 1, run_config(folders["hf"], train={"precision": "bf16"}))
    tensors = read_model_tensors(iteration_folder(folders["run"], 2))
    assert len(pairs) == len(tensors)
    expected = {hash_of(tensor) for tensor in tensors.values()}
    assert {hash_of(master) for _, master in pairs} == expected
    assert all(weight.reshape(-1).equal(master.to(weight.dtype)) for weight, master in pairs)
    assert not all(master.equal(master.bfloat16().float()) for _, master in pairs)


def hash_of(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()


def test_moments_start_anew_and_the_run_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    config = run_config(folders["hf"], train={"output": str(tmp_path)})
    initial = initial_weights(config, folders["tokenizer"])
    assert initial
    initial.refuse_misfits()
    assert initial.description == (
        f"weights of {folders['hf']}: {len(initial.tensors)} tensors; no moments are in it, the optimizer and the "
        "data begin anew"
    )


def refused(config: Config, tokenizer: Path) -> list[str]:
    initial = InitialWeights.open(config, tokenizer)
    with pytest.raises(UserError) as caught:
        initial.refuse_misfits()
    return [one.replace(config.train.initialize_from[0], "FOLDER") for one in caught.value.problems]


def test_all_that_does_not_fit_is_named_at_once(folders: dict[str, Path], tmp_path: Path) -> None:
    model = {"hidden_size": 32, "auxiliary_num_layers": 3, "relative_bucket": "t5", "rtd_head": "dense"}
    other = write_tokenizer(tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.__getitem__)[-1:-3:-1]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    path.write_text(json.dumps(content))
    config = run_config(folders["hf"], model=model, objective={"main": ["rtd", "clm", "scl"]})
    found = refused(config, other)
    prefix = "train.initialize_from FOLDER: "
    assert [one.removeprefix(prefix) for one in found[:5]] == [
        "model.hidden_size is 32, FOLDER has 64",
        "model.relative_bucket is t5, FOLDER has coco",
        "model.rtd_head is dense, FOLDER has linear",
        "model.auxiliary_num_layers is 3, FOLDER has 2",
        "give --model.hidden_size 64 --model.relative_bucket coco --model.rtd_head linear "
        "--model.auxiliary_num_layers 2",
    ]
    assert found[5].endswith(
        "scl is not there; add scl to train.initialize_fresh, and it starts at random, or give a folder that has it, "
        "or leave it out of objective.main"
    )
    assert "FOLDER has another tokenizer: id 298 is" in found[6] and len(found) == 7


def test_what_a_folder_lacks_starts_at_random_only_where_it_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    alone = small_config(corruption={"source": "uniform"})
    tensors = read_model_tensors(iteration_folder(folders["run"], 2))
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(("aux.", "main.clm_head"))}
    write_hf_folder(tmp_path / "hf", own, exported_model(alone), folders["tokenizer"], {}, objectives=["rtd"])
    found = refused(run_config(tmp_path / "hf"), folders["tokenizer"])
    assert [one.split(": ")[1].split(";")[0] for one in found] == ["auxiliary is not there", "clm is not there"]
    MetroForReplacedTokenDetection.from_pretrained(folders["hf"]).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_bytes((folders["tokenizer"] / "tokenizer.json").read_bytes())
    assert len(refused(run_config(tmp_path / "saved"), folders["tokenizer"])) == 2, "though config.json has all of it"
    MetroModel.from_pretrained(folders["hf"]).save_pretrained(tmp_path / "encoder")  # names without "metro."
    (tmp_path / "encoder" / "tokenizer.json").write_bytes((folders["tokenizer"] / "tokenizer.json").read_bytes())
    config = run_config(tmp_path / "encoder", train={"initialize_fresh": ["auxiliary", "clm", "rtd"]})
    initial = InitialWeights.open(config, folders["tokenizer"])
    initial.refuse_misfits()
    of_main = {name for name in tensors if name.startswith(("main.embedding", "main.block", "tied.word", "tied.main"))}
    assert set(initial.tensors) == of_main and all(initial.tensors[name].equal(tensors[name]) for name in of_main)
    parts = {"initialize_fresh": ["auxiliary", "clm"]}
    config = run_config(tmp_path / "hf", train=parts, model={"auxiliary_num_layers": 3})
    InitialWeights.open(config, folders["tokenizer"]).refuse_misfits()
    ((begun, plain),) = run_ranks(begin_alone, 1, [config, replace(config, train=small_config().train)])
    for name, tensor in begun.weights.items():
        expected = own[name] if name in own else plain.weights[name]
        assert tensor.equal(expected), "what is fresh is what a run of nothing else begins with"


def test_options_that_exclude_each_other_are_named(folders: dict[str, Path]) -> None:
    both = run_config(folders["hf"], train={"branch_from": "elsewhere"})
    assert any("leave one of them out" in one for one in problems(both, 1))
    alone = small_config(train={"initialize_fresh": ["clm"]})
    assert any("train.initialize_fresh is clm, but without train.initialize_from" in one for one in problems(alone, 1))
    found = refused(run_config(folders["hf"], train={"initialize_fresh": ["mlm"]}), folders["tokenizer"])
    assert found[0].endswith("train.initialize_fresh names mlm, which the run does not have; leave it out")
    found = refused(run_config(folders["hf"], corruption={"source": "main"}), folders["tokenizer"])
    assert len(found) == 1 and ": auxiliary is not there; add auxiliary" in found[0], "a head on a layer of main"
    with pytest.raises(UserError, match="tokenizer: neither a run or checkpoint nor a folder with a config.json; give"):
        open_pretrained(folders["tokenizer"])
