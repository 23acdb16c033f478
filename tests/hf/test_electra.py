"""ELECTRA of transformers becomes our pair, is trained, and becomes transformers' again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForPreTraining,
    AutoTokenizer,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraModel,
)

from metro_megatron.checkpoint.read import SEGMENTS
from metro_megatron.checkpoint.save import Checkpoints
from metro_megatron.commands.convert_checkpoint import Options, main
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch
from metro_megatron.errors import UserError
from metro_megatron.hf.electra import (
    CLASSES,
    TABLE,
    TYPES,
    electra_roles,
    electra_tensors,
    open_electra,
    read_segments,
    write_electra_folders,
)
from metro_megatron.hf.weights import hf_tensors
from metro_megatron.parallel.optim import Update
from metro_megatron.tokenizer.tokenizer import copy_tokenizer
from metro_megatron.train.initial_weights import InitialWeights
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.hf.pair import write_tokenizer
from tests.parity.small_run import VOCAB_SIZE, Figures, small_config, small_corpus, whole_weights

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "embedding_size": 24,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
    "initializer_range": 0.05,
}
GENERATOR = ElectraConfig(**COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
DISCRIMINATOR = ElectraConfig(
    **COMMON, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
)
MODEL: dict[str, Any] = {
    "embedding_size": 24,
    "auxiliary_hidden_size": 32,
    "auxiliary_num_attention_heads": 2,
    "auxiliary_ffn_hidden_size": 96,
    "relative_bucket": "none",
    "reset_cls": False,
    "shared_embeddings": "token_position_norm",
    "rtd_head": "dense",
    "layer_norm_eps": 1e-12,
}
"""What of small_config's model is not an ELECTRA."""


def write_pair(root: Path, is_tied: bool = True) -> list[Path]:
    """A random pair of transformers with a tokenizer, biases and norms at random, too."""
    torch.manual_seed(5)
    generator, discriminator = ElectraForMaskedLM(GENERATOR), ElectraForPreTraining(DISCRIMINATOR)
    with torch.no_grad():
        for parameter in [*generator.parameters(), *discriminator.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if is_tied:
        discriminator.electra.embeddings = generator.electra.embeddings
    folders = [root / "generator", root / "discriminator"]
    tokenizer = write_tokenizer(root / "tokenizer")
    for model, folder in zip((generator, discriminator), folders, strict=True):
        model.save_pretrained(folder)
        copy_tokenizer(tokenizer, folder)
    return folders


def electra_run(*folders: Path, **train: Any) -> Config:
    return small_config(
        model=MODEL,
        objective={"main": ["rtd"]},
        optimizer={"lr": 5e-4, "lr_warmup_steps": 0, "clip_grad": 1.0},
        data={"row_format": "padded", "micro_batch_size": 24},
        parallel={"tensor_model_parallel_size": 2},
        train={"initialize_from": list(map(str, folders)), **train},
    )


@dataclass
class OneStep:
    batch: MicroBatch
    corrupted: Tensor
    figures: Figures
    update: Update
    weights: dict[str, Tensor]


def one_step(config: Config) -> OneStep:
    """On every rank: the first step, and the weights after it, which are saved where there is a run folder."""
    trainer = Trainer(config, small_corpus(config), torch.device("cpu"))
    try:
        batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
        (micro_batch,) = batch.micro_batches
        metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
        (corrupted,) = trainer.step.evaluate(batch, metrics)
        metrics.reduce()
        update = trainer.step.train(batch, metrics).read()
        trainer.homes.fetch_parameters()
        if config.train.output:
            trainer.initial.write_segments(Path(config.train.output))
            Checkpoints(config, trainer.layout, trainer.pair, trainer.optimizer).save(1, {"step": 1})
        return OneStep(micro_batch, corrupted, metrics.reduce(), update, whole_weights(trainer))
    finally:
        trainer.close()


@dataclass
class Plain:
    """The pair in transformers' classes, which a text of one segment adds one constant to: part of its positions."""

    generator: ElectraForMaskedLM
    discriminator: ElectraForPreTraining

    @classmethod
    def load(cls, folders: list[Path]) -> Plain:
        kinds = (ElectraForMaskedLM, ElectraForPreTraining)
        models = [kind.from_pretrained(path).double().train() for kind, path in zip(kinds, folders, strict=True)]
        embeddings = models[0].electra.embeddings
        with torch.no_grad():
            embeddings.position_embeddings.weight += embeddings.token_type_embeddings.weight[0]
            embeddings.token_type_embeddings.weight.zero_()
        embeddings.token_type_embeddings.requires_grad_(False)
        models[1].electra.embeddings = embeddings
        return cls(*models)

    def step(self, one: OneStep, config: Config) -> tuple[float, float, float]:
        """(loss of the generator, of the discriminator, norm of all gradients), and torch's AdamW."""
        batch, options = one.batch, config.optimizer
        labels = batch.tokens.masked_fill(~batch.is_masked, -100)
        mlm = self.generator(batch.masked_tokens, batch.is_real.long(), labels=labels).loss
        is_replaced = (one.corrupted != batch.tokens).long()
        assert is_replaced.any() and not batch.is_real.all()
        rtd = self.discriminator(one.corrupted, batch.is_real.long(), labels=is_replaced).loss
        (mlm + 50 * rtd).backward()
        trained = [x for x in {*self.generator.parameters(), *self.discriminator.parameters()} if x.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, options.clip_grad)
        matrices = [x for x in trained if x.dim() > 1]
        vectors = [x for x in trained if x.dim() == 1]
        torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=one.update.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            weight_decay=options.weight_decay,
        ).step()
        return mlm.item(), rtd.item(), norm.item()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_pair(tmp_path_factory.mktemp("electra"))


@pytest.fixture(scope="module")
def trained(pair: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, OneStep]:
    """A step of the pair on two tensor-parallel ranks, and the run's folder."""
    run = tmp_path_factory.mktemp("run")
    copy_tokenizer(pair[0], run / "tokenizer")
    config = electra_run(*pair, output=str(run))
    return config, run_ranks(one_step, 2, config)[0]


def test_a_step_is_that_of_plain_torch_on_transformers_pair(pair: list[Path], trained: tuple[Config, OneStep]) -> None:
    config, one = trained
    plain = Plain.load(pair)
    before = {name: tensor.clone() for name, tensor in plain.discriminator.state_dict().items()}
    mlm, rtd, norm = plain.step(one, config)
    assert one.figures["aux_loss"] == pytest.approx(mlm, rel=1e-6)
    assert one.figures["rtd_loss"] == pytest.approx(rtd, rel=1e-6)
    assert one.update.grad_norm == pytest.approx(norm, rel=1e-5)
    exported = hf_tensors(one.weights, config.model, ["rtd"])
    for role, model in (("generator", plain.generator), ("discriminator", plain.discriminator)):
        ours, theirs = electra_tensors(exported, config.model, role), model.state_dict()
        assert set(ours) == theirs.keys()
        for name, expected in theirs.items():
            assert (ours[name] - expected).abs().max() < 1e-6, name
    moved = [name for name, tensor in plain.discriminator.state_dict().items() if not tensor.equal(before[name])]
    assert len(moved) == len(before) - 1, "all but the segments"


def test_untrained_segments_come_back_bit_by_bit(pair: list[Path], tmp_path: Path) -> None:
    """A pair with rows of both segments becomes ours and transformers' again; then with changed positions."""
    config = electra_run(*pair)
    initial = InitialWeights.open(config, pair[0])
    initial.write_segments(tmp_path)
    kept = read_segments(tmp_path / SEGMENTS)
    weights = dict(initial.tensors)
    exported = hf_tensors(weights, config.model, ["rtd"])
    for role, folder in zip(electra_roles(config.model, ["rtd"]), pair, strict=True):
        expected = CLASSES[role].from_pretrained(folder).state_dict()
        assert expected[TYPES].std(1).min() > 0
        found = electra_tensors(exported, config.model, role, kept)
        assert found.keys() == expected.keys() and all(found[name].equal(one) for name, one in expected.items())
    (name,) = (name for name in weights if name.endswith("position.weight"))
    weights[name] = weights[name] + 0.5
    trained = electra_tensors(hf_tensors(weights, config.model, ["rtd"]), config.model, "discriminator", kept)
    assert not trained[TYPES][0].any()
    for segment in (0, 1):
        torch.testing.assert_close(
            trained[TABLE] + trained[TYPES][segment], expected[TABLE] + expected[TYPES][segment] + 0.5
        )
    (tmp_path / SEGMENTS).write_bytes(b"{}")
    with pytest.raises(UserError, match="segments.safetensors: damaged .* or remove it: segments become 0"):
        read_segments(tmp_path / SEGMENTS)


def convert(run: str, output: str) -> None:
    main(Options(load=run, output=output, format="electra"))


@pytest.fixture(scope="module")
def written(trained: tuple[Config, OneStep], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tool made of the run."""
    output = tmp_path_factory.mktemp("written") / "out"
    run_ranks(convert, 1, trained[0].train.output, str(output))
    return output


def test_a_trained_pair_becomes_folders_of_transformers_own(trained: tuple[Config, OneStep], written: Path) -> None:
    config, one = trained
    exported = hf_tensors(one.weights, config.model, ["rtd"])
    kept = read_segments(Path(config.train.output) / SEGMENTS)
    for role in electra_roles(config.model, ["rtd"]):
        folder = written / role
        assert not list(folder.glob("*.py")) and "auto_map" not in json.loads((folder / "config.json").read_text())
        kind = ElectraForMaskedLM if role == "generator" else AutoModelForPreTraining
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
        expected = electra_tensors(exported, config.model, role, kept)
        assert not expected[TYPES][0].any() and expected[TYPES][1].any()
        assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())
        assert AutoTokenizer.from_pretrained(folder)("the cat").input_ids[0] == 0
        assert "largest difference to the trainer's outputs" in (folder / "README.md").read_text()
    again = electra_run(written / "generator", written / "discriminator")
    back = InitialWeights.open(again, written / "generator")
    back.refuse_misfits()
    for name, tensor in one.weights.items():
        assert back.tensors[name].equal(tensor), name


@pytest.mark.parametrize("harm", ["another's card", "a file more", "no card"])
def test_folders_of_others_with_these_names_are_not_replaced(
    pair: list[Path], trained: tuple[Config, OneStep], tmp_path: Path, harm: str
) -> None:
    config, one = trained
    output = tmp_path / "out"
    for _ in range(2):  # what the tool itself wrote is replaced
        write_electra_folders(output, one.weights, config.model, pair[0], {}, objectives=["rtd"])
    card, folder = output / "generator" / "README.md", output / "generator"
    if harm == "another's card":
        card.write_text("# ELECTRA small, a generator\n")
    elif harm == "a file more":
        (folder / "trainer_state.json").write_text("{}")
    else:
        card.unlink()
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="generator (is not by this tool|holds 'trainer_state.json')"):
        write_electra_folders(output, one.weights, config.model, pair[0], {}, objectives=["rtd"])
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def refused(config: Config, folders: list[Path]) -> list[str]:
    with pytest.raises(UserError) as caught:
        InitialWeights.open(config, folders[0]).refuse_misfits()
    return [one.replace(str(folders[0].parent), "") for one in caught.value.problems]


def test_one_of_the_pair_leaves_the_other_to_chance_only_where_that_is_said(pair: list[Path]) -> None:
    generator, discriminator = pair
    assert refused(electra_run(discriminator), [discriminator])[0].startswith(
        "train.initialize_from /discriminator: auxiliary is not there; add auxiliary to train.initialize_fresh"
    )
    config = electra_run(discriminator, initialize_fresh=["auxiliary"])
    InitialWeights.open(config, generator).refuse_misfits()
    found = refused(electra_run(generator), [generator])
    assert [one.split(": ")[1].split(";")[0] for one in found] == ["main is not there", "rtd is not there"]
    config = electra_run(generator, initialize_fresh=["main", "rtd"])
    initial = InitialWeights.open(config, generator)
    initial.refuse_misfits()
    assert "tied.word.weight" in initial.tensors and "; main, rtd at random; no moments" in initial.description


def test_what_is_no_pair_of_ours_is_named(pair: list[Path], tmp_path: Path) -> None:
    folders = write_pair(tmp_path, is_tied=False)
    found = refused(electra_run(*folders), folders)
    assert len(found) == 4 and all("differ, and one tensor cannot be both" in one for one in found)
    apart = replace(electra_run(*folders), model=replace(electra_run().model, shared_embeddings="none"))
    InitialWeights.open(apart, folders[0]).refuse_misfits()
    small = replace(electra_run(*pair), model=replace(electra_run().model, layer_norm_eps=1e-5, reset_cls=True))
    assert [one.split(": ")[1] for one in refused(small, pair)] == [
        "model.reset_cls is true, /generator has false",
        "model.layer_norm_eps is 1e-05, /generator has 1e-12",
        "model.reset_cls is true, /discriminator has false",
        "model.layer_norm_eps is 1e-05, /discriminator has 1e-12",
        "give --model.reset_cls false --model.layer_norm_eps 1e-12",
    ]
    plain = replace(small_config(), objective=small.objective, train=small.train)
    told = refused(plain, pair)[-1].partition(": give ")[2].split()
    values = {name.removeprefix("--model."): value for name, value in zip(told[::2], told[1::2], strict=True)}
    given = {name: value for name, value in MODEL.items() if name != "shared_embeddings"}
    assert values == {name: str(value).lower() for name, value in given.items()}, "sizes of 0 follow main's"
    path = folders[0] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "relu"}))
    with pytest.raises(UserError, match="hidden_act is 'relu', of ours 'gelu'"):
        open_electra(folders[0])
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu", "vocab_size": "300"}))
    with pytest.raises(UserError, match="config.json: transformers cannot read it .*vocab_size"):
        open_electra(folders[0])
    bare = tmp_path / "bare"
    ElectraModel(ElectraConfig.from_pretrained(pair[1])).save_pretrained(bare)
    with pytest.raises(UserError, match="was saved by ElectraModel, .* save it by ElectraForMaskedLM or"):
        open_electra(bare)
    with pytest.raises(UserError) as caught:
        electra_roles(small_config().model, ["clm"])
    assert caught.value.problems == [
        "model.relative_bucket is coco, ELECTRA's is none",
        "model.reset_cls is true, ELECTRA's is false",
        "model.rtd_head is linear, ELECTRA's is dense",
        "objective.main is clm, ELECTRA's discriminator has learned rtd",
        "no ELECTRA has these: write the folder with --format metro",
    ]


def test_older_files_are_read_without_running_what_they_hold(pair: list[Path], tmp_path: Path) -> None:
    model = ElectraForPreTraining.from_pretrained(pair[1])
    (tmp_path / "config.json").write_bytes((pair[1] / "config.json").read_bytes())
    state = {**model.state_dict(), "electra.embeddings.position_ids": torch.arange(64)[None]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    expected, found = open_electra(pair[1]), open_electra(tmp_path)
    assert not found.unread and set(found.tensors) == set(expected.tensors)
    assert all(found.tensors[name].equal(tensor) for name, tensor in expected.tensors.items())
    for code, name in ((print, "print"), (os.system, "system")):  # torch refuses some by a list, others as unknown
        torch.save({**state, "more": code}, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match=f"refers to .*{name}, which could run code, and is not loaded"):
            open_electra(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "other")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": ["other"]}}')
    with pytest.raises(UserError, match="index.json: no weight_map of files in it"):
        open_electra(tmp_path)
