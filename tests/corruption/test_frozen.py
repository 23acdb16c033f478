"""A frozen model fills the masks: any of transformers', what it draws, and what a run does without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from fused.linear_cross_entropy import gumbel_noise
from metro_megatron.checkpoint.files import check_metadata, iteration_folder
from metro_megatron.config.schema import Config, CorruptionConfig, ParallelConfig
from metro_megatron.corruption.corruptor import Proposal
from metro_megatron.corruption.frozen import Frozen
from metro_megatron.data.batch import MicroBatch
from metro_megatron.errors import UserError
from metro_megatron.hf.export import exported_model, metro_config, write_hf_folder
from metro_megatron.hf.modeling_metro import MetroForAuxiliaryMaskedLM, MetroForMaskedLM
from metro_megatron.parallel.layout import Layout
from metro_megatron.tokenizer.tokenizer import copy_tokenizer
from metro_megatron.train.frozen_model import FrozenFolder, refuse_other_model
from metro_megatron.vocabulary import NUM_SPECIALS, PAD_ID
from tests.corruption.sources import record, source_config
from tests.distributed import run_ranks
from tests.hf.pair import MODEL, trainer_tensors, write_tokenizer
from tests.parity.small_run import VOCAB_SIZE, run_steps, small_config, small_corpus, start

SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FORM: dict[str, Any] = {"intermediate_size": 64, "max_position_embeddings": 50, "pad_token_id": PAD_ID}
CONFIGS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**SIZES, **{**FORM, "max_position_embeddings": 48}),
    "roberta": RobertaConfig(**SIZES, **FORM),
    "electra": ElectraConfig(**SIZES, **FORM, embedding_size=16),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB_SIZE, dim=32, n_layers=2, n_heads=2, hidden_dim=64, pad_token_id=PAD_ID
    ),
    "deberta": DebertaV2Config(
        **SIZES, **FORM, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False
    ),
}


def save(name: str, folder: Path, spread: float = 5.0) -> Path:
    """A random model of transformers whose distributions are far from uniform."""
    torch.manual_seed(3)
    model = AutoModelForMaskedLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.get_output_embeddings().weight.mul_(spread)
    model.save_pretrained(folder)
    return folder


def proposals(asked: list[tuple[Config, str]]) -> list[list[tuple[Proposal, MicroBatch]]]:
    """Of the first step's micro batches, for each configuration and folder of a model."""
    found = []
    for config, folder in asked:
        layout = Layout.create(ParallelConfig(), torch.device("cpu"))
        batch = replace(small_corpus(config).training_data(layout).step_batch(0, 0), step=3)
        corruptor = Frozen(config, layout, FrozenFolder(folder).load())
        found.append([(corruptor.propose(one, batch, lambda loss: loss), one) for one in batch.micro_batches])
        layout.destroy()
    return found


@torch.no_grad()
def brute_force(model: PreTrainedModel, micro_batch: MicroBatch) -> Tensor:
    """Logits [M, V] at the masked positions, one sample at a time, in the order of masked_index."""
    rows, length = micro_batch.tokens.shape
    logits = torch.zeros(rows * length, VOCAB_SIZE)
    cell = 0
    for number, size in enumerate(micro_batch.sample_lengths.tolist()):
        cell = cell if micro_batch.is_packed else number * length
        if size:
            ids = micro_batch.masked_tokens.reshape(-1)[cell : cell + size][None]
            logits[cell : cell + size] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        cell += size
    return logits.view(rows, length, -1).transpose(0, 1).flatten(0, 1)[micro_batch.masked_index]


def test_replacements_of_any_masked_language_model_are_those_of_its_logits(tmp_path: Path) -> None:
    cooling = {"source": "frozen", "temperature_schedule": "linear", "temperature": 3.0, "disallow_correct": True}
    packed, padded = (
        small_config(corruption=cooling, data={"row_format": row_format}, train={"train_steps": 6})
        for row_format in ("packed", "padded")
    )
    folders = [str(save(name, tmp_path / name)) for name in CONFIGS]
    asked = [(config, folder) for folder in folders for config in (packed, padded)]
    for (_, folder), proposed in zip(asked, run_ranks(proposals, 1, asked)[0], strict=True):
        model = AutoModelForMaskedLM.from_pretrained(folder).eval()
        for proposal, micro_batch in proposed:
            logits, targets = brute_force(model, micro_batch), micro_batch.masked_targets
            scores = logits + 2.0 * gumbel_noise(micro_batch.noise_keys, torch.arange(VOCAB_SIZE).int())
            scores[:, :NUM_SPECIALS] = -torch.inf
            scores.scatter_(1, targets[:, None], -torch.inf)
            assert torch.equal(proposal.sampled, scores.argmax(1))
            loss = functional.cross_entropy(logits, targets, reduction="sum")
            torch.testing.assert_close(proposal.sums["aux_loss"], loss, rtol=1e-5, atol=1e-4)
            assert proposal.sums["aux_correct"] == (logits.argmax(1) == targets).sum()
            assert proposal.sums["sample_correct"] == 0


def train_and_save(config: Config) -> None:
    trainer = start(config)
    run_steps(trainer, 0, 1)
    trainer.progress.done = 1
    trainer.save()
    trainer.close()


PLAIN: dict[str, Any] = {"objective": {"main": ["mlm"]}, "corruption": {"source": "none"}}


@pytest.mark.parametrize(
    ("kind", "other"), [(MetroForAuxiliaryMaskedLM, {}), (MetroForMaskedLM, PLAIN)], ids=["pair", "plain MLM"]
)
def test_a_run_folder_and_its_export_draw_alike(kind: Any, other: dict[str, Any], tmp_path: Path) -> None:
    from tests.checkpoint.tensors import read_model_tensors

    run, export = tmp_path / "run", tmp_path / "export"
    run.mkdir()
    config = small_config(train={"output": str(run)}, **other)
    run_ranks(train_and_save, 1, config)
    tokenizer = write_tokenizer(run / "tokenizer")
    tensors, main = read_model_tensors(iteration_folder(run, 1)), config.objective.main
    write_hf_folder(export, tensors, exported_model(config), tokenizer, {}, objectives=main)
    frozen = small_config(corruption={"source": "frozen"})
    folders = (run, iteration_folder(run, 1), export)
    drawn = run_ranks(proposals, 1, [(frozen, str(folder)) for folder in folders])[0]
    for of_run, of_iteration, of_export in zip(*drawn, strict=True):
        assert torch.equal(of_run[0].sampled, of_export[0].sampled)
        assert torch.equal(of_run[0].sampled, of_iteration[0].sampled)
    model = kind.from_pretrained(export).eval()
    proposal, micro_batch = drawn[0][0]
    loss = functional.cross_entropy(brute_force(model, micro_batch), micro_batch.masked_targets, reduction="sum")
    torch.testing.assert_close(proposal.sums["aux_loss"], loss, rtol=1e-5, atol=1e-4)
    assert FrozenFolder(str(run)).sha256 != FrozenFolder(str(export)).sha256
    refuse_other_model(replace(frozen, corruption=CorruptionConfig(frozen_model=str(run))), tokenizer)


def frozen_run(config: Config) -> tuple[Any, dict[str, int], list[str]]:
    """What a run shows, elements of its gradient buffers and of its optimizer's, and names in its checkpoint."""
    trainer = start(config)
    ddps = [*trainer.homes.shared.values(), *trainer.homes.stage]
    sizes = {
        "gradients": sum(buffer.grad_data.numel() for ddp in ddps for buffer in ddp.buffers),
        "parameters": sum(p.numel() for _, module in trainer.pair.modules() for p in module.parameters()),
        "frozen with gradients": sum(p.requires_grad for p in trainer.parts.corruptor.model.parameters()),
    }
    folder = trainer.checkpoints.save(0, {}).folder
    sizes["optimizer"] = sum(
        moments["exp_avg"].numel()
        for one in (trainer.optimizer.shared, trainer.optimizer.stage)
        for moments in one.optimizer.state.values()
    )
    return record(trainer), sizes, list(check_metadata(folder).state_dict_metadata)


def test_a_frozen_model_has_no_gradients_no_optimizer_state_and_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    folder = save("bert", tmp_path / "bert")
    frozen = CorruptionConfig(source="frozen", frozen_model=str(folder))
    config = source_config(frozen)
    config = replace(config, train=replace(config.train, output=str(tmp_path / "run")))
    (tmp_path / "run").mkdir()
    found, sizes, names = run_ranks(frozen_run, 1, config)[0]
    assert sizes["frozen with gradients"] == 0
    padding = 128 * 64  # of buckets
    assert sizes["parameters"] <= sizes["gradients"] < sizes["parameters"] + padding
    assert sizes["parameters"] <= sizes["optimizer"] < sizes["parameters"] + padding
    assert sizes["parameters"] < 0.8 * sum(torch.Size(shape).numel() for shape in ()) or not any(
        "aux" in name.split(".") for name in names
    )
    assert found.modules == ["tied"] and found.trained == {"tied", "main"}
    first, last = found.figures[0], found.figures[-1]
    assert last["rtd_loss"] < first["rtd_loss"]
    assert {"aux_loss", "aux_accuracy", "sampled_accuracy"} <= first.keys()


def test_what_does_not_fit_is_named_together(tmp_path: Path, tokenizer_folder: Path) -> None:
    ours = write_tokenizer(tmp_path / "tokenizer")
    export = tmp_path / "export"
    write_hf_folder(export, trainer_tensors(), MODEL, ours, {})
    frozen = {"source": "frozen", "frozen_model": str(export)}
    fitting = small_config(corruption=frozen, data={"seq_length": 40})
    assert refuse_other_model(fitting, ours).sha256 == FrozenFolder(str(export)).sha256
    longer = small_config(corruption=frozen, data={"seq_length": 41}, model={"vocab_size": 2000})
    with pytest.raises(UserError) as error:
        refuse_other_model(longer, tokenizer_folder)
    (positions, ids, tokens) = error.value.problems
    assert "export has 40 positions, data.seq_length is 41; lower the second" in positions
    assert "export has 300 ids, the run 2000; give a model that was trained with the run's tokenizer" in ids
    first = next(
        number
        for number in range(2000)
        if len({AutoTokenizer.from_pretrained(one).convert_ids_to_tokens(number) for one in (ours, tokenizer_folder)})
        > 1
    )
    assert f"another tokenizer: id {first} is" in tokens and "preprocess with the model's" in tokens


def test_positions_are_counted_behind_those_of_padding(tmp_path: Path) -> None:
    """RoBERTa's table of 50 rows begins behind <pad>'s: it holds 48 positions, and DeBERTa's are only relative."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    for name, message in (("roberta", "has 48 positions, data.seq_length is 49"), ("deberta", "")):
        folder = save(name, tmp_path / name)
        copy_tokenizer(tokenizer, folder)
        found = FrozenFolder(str(folder)).problems(small_config(data={"seq_length": 49}), tokenizer)
        assert (message in found[0]) if message else found == []


def test_a_main_model_that_fills_no_masks_is_refused(tmp_path: Path) -> None:
    metro_config(replace(small_config().model, auxiliary_num_layers=0), ["rtd"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it has no auxiliary, and main learned rtd"):
        FrozenFolder(str(tmp_path)).load()


def test_a_folder_of_nothing_and_a_head_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder or checkpoint nor a folder with a config.json"):
        FrozenFolder(str(tmp_path))
    folder = save("bert", tmp_path / "bert")
    with pytest.raises(UserError, match="BertForMaskedLM are not those of a linear output layer"):  # noqa: SIM117
        with patch.object(
            BertForMaskedLM, "get_output_embeddings", lambda self: self.bert.encoder.layer[0].output.dense
        ):
            FrozenFolder(str(folder)).load()


def test_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    folder = save("bert", tmp_path / "bert", spread=float("inf"))
    with pytest.raises(UserError, match=r"values of bert\.embeddings\.word_embeddings\.weight .* no finite numbers"):
        FrozenFolder(str(folder)).load()


def test_what_is_no_whole_masked_language_model_is_refused(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    small = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 1, "n_head": 2}
    models: dict[str, PreTrainedModel] = {
        "encoder": BertModel(CONFIGS["bert"]),
        "left to right": BertForMaskedLM(BertConfig(**SIZES, is_decoder=True)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**small)),
        "damaged": BertForMaskedLM(CONFIGS["bert"]),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    alone = {name: tensor for name, tensor in trainer_tensors().items() if not name.startswith("aux.")}
    write_hf_folder(tmp_path / "alone", alone, replace(MODEL, auxiliary_num_layers=0), tokenizer, {})
    for name, message in {
        "encoder": "no masked language model, cls.predictions.* is missing",
        "left to right": "no masked language model \\(it reads from left to right\\)",
        "gpt2": "no masked language model \\(Unrecognized configuration class",
        "damaged": "its weights cannot be read .*give another copy",
        "alone": "no masked language model \\(it has no auxiliary, and main learned rtd clm",
    }.items():
        with pytest.raises(UserError, match=f"corruption.frozen_model {tmp_path / name}: {message}"):
            FrozenFolder(str(tmp_path / name)).load()
