"""From a published layout to a run and back: an ELECTRA with BERT's ids, and every kind of tokenizer through a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from metro_megatron.checkpoint.save import Checkpoints
from metro_megatron.commands.convert_checkpoint import Options, main
from metro_megatron.commands.evaluate import load_pair
from metro_megatron.config.schema import Config
from metro_megatron.data.vocabulary import with_vocabulary
from metro_megatron.evaluate.intrinsic import evaluate, held_out_text
from metro_megatron.evaluate.sentences import show
from metro_megatron.preprocess.options import PlanOptions, PreprocessOptions
from metro_megatron.preprocess.run import preprocess
from metro_megatron.tokenizer.tokenizer import Tokenizer, copy_tokenizer
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.parity.small_run import small_config
from tests.tokenizer.others import KINDS, write_other

SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "embedding_size": 32}
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "ffn_hidden_size": 64,
    "num_layers": 2,
    "auxiliary_num_layers": 1,
    "vocab_size": 128000,
}
ELECTRA: dict[str, Any] = {
    "relative_bucket": "none",
    "reset_cls": False,
    "shared_embeddings": "token_position_norm",
    "rtd_head": "dense",
    "layer_norm_eps": 1e-12,
}


@pytest.fixture(scope="module")
def datasets(reviews: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A prefix for each of KINDS."""
    folder = tmp_path_factory.mktemp("datasets")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": "\n".join(one)}) + "\n" for one in reviews[:120]))
    for kind in KINDS:
        write_other(kind, (unit for one in reviews[:120] for unit in one), folder / kind / "tokenizer")
        inputs, prefix = [str(folder / "a.jsonl")], str(folder / kind / "s")
        preprocess(PreprocessOptions(inputs, str(folder / kind / "tokenizer"), prefix, PlanOptions()))
    return {kind: str(folder / kind / "s") for kind in KINDS}


def run_config(prefix: str, model: dict[str, Any], **concerns: Any) -> Config:
    return with_vocabulary(small_config(model={**MODEL, **model}, data={"train": [prefix]}, **concerns))


def steps(config: Config, count: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """On a lone rank: originals, what the auxiliary read, and what main read, in `count` steps that are trained."""
    corpus = Corpus.open(config)
    trainer = Trainer(config, corpus, torch.device("cpu"))
    found, first = [], 0
    try:
        for step in range(count):
            batch = trainer.corpus.training_data(trainer.layout).step_batch(step, first)
            first = batch.end
            metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
            corrupted = trainer.step.evaluate(batch, metrics)
            metrics.reduce()
            assert trainer.step.train(batch, metrics).read().grad_norm > 0
            assert sum(one.masked_index.numel() for one in batch.micro_batches) == batch.num_masked
            for one, read in zip(batch.micro_batches, corrupted, strict=True):
                found.append(tuple(ids[one.is_real].numpy() for ids in (one.tokens, one.masked_tokens, read)))
        trainer.homes.fetch_parameters()
        copy_tokenizer(corpus.tokenizer_folder, Path(config.train.output) / "tokenizer")
        if trainer.initial:
            trainer.initial.write_segments(Path(config.train.output))
        Checkpoints(config, trainer.layout, trainer.pair, trainer.optimizer).save(count, {"step": count})
    finally:
        trainer.close()
    return found


def from_text_to_export(runs: dict[str, Config]) -> dict[str, Any]:
    """On a lone rank: of each run its steps, figures of the export, and a sentence that it fills."""
    found = {}
    for name, config in runs.items():
        batches = steps(config, 2)
        output = Path(f"{config.train.output}_hf")
        main(Options(load=config.train.output, output=str(output)))
        tokenizer, pair = Tokenizer.from_folder(output), load_pair(output)
        text = held_out_text([["The film was good, and the actors were not."] * 5] * 4, tokenizer)
        counts = np.ones(config.model.vocab_size, dtype=np.int64)
        figures = evaluate(pair, text, counts, 4, 1, lambda done, total: None)
        sentence = "the film was as good as the actors who were in it."
        found[name] = batches, figures, next(iter(show(pair, output, [sentence], counts, 1)))
    return found


@pytest.mark.long
def test_every_kind_from_text_to_an_evaluated_export(datasets: dict[str, str], tmp_path: Path) -> None:
    runs = {}
    for kind, prefix in datasets.items():
        objective = {"keep_probability": 0.1, "random_probability": 0.3, "whole_word_masking": kind == "wordpiece"}
        runs[kind] = run_config(prefix, {}, objective=objective, train={"output": str(tmp_path / kind)})
    for kind, (batches, figures, shown) in run_ranks(from_text_to_export, 1, runs)[0].items():
        tokenizer = Tokenizer.from_folder(f"{datasets[kind]}.tokenizer")
        ids, config = tokenizer.special_ids, runs[kind]
        assert (config.model.vocab_size, config.model.special_ids) == (tokenizer.vocab_size, ids)
        exported = json.loads((tmp_path / f"{kind}_hf" / "config.json").read_text())
        names = ("bos_token_id", "pad_token_id", "eos_token_id", "mask_token_id")
        assert [exported[name] for name in names] == [ids.bos, ids.pad, ids.eos, ids.mask]
        for originals, hidden, read in batches:
            touched = (hidden != originals) | (read != originals)
            assert touched.any() and not np.isin(originals[touched], ids.all).any(), "no special id is masked"
            shown_instead = hidden[touched & (hidden != ids.mask)]
            assert not np.isin(shown_instead, ids.all).any(), "nor put at random"
            assert not np.isin(read[touched], ids.all).any() and read.max() < tokenizer.vocab_size, "nor drawn"
        assert np.isfinite([figures["aux_loss"], figures["rtd_loss"], figures["clm_loss"]]).all()
        assert tokenizer.token(ids.mask) in shown.masked and "film" in shown.original


def write_electra(folder: Path, tokenizer: Path, vocab_size: int) -> list[Path]:
    """A random pair of transformers, as published ones are: BERT's ids, pad_token_id 0."""
    torch.manual_seed(3)
    common = {**SIZES, "vocab_size": vocab_size, "max_position_embeddings": 64, "pad_token_id": 0}
    generator = ElectraForMaskedLM(ElectraConfig(**common, num_hidden_layers=1))
    discriminator = ElectraForPreTraining(ElectraConfig(**common, num_hidden_layers=2))
    discriminator.electra.embeddings = generator.electra.embeddings
    for name, model in {"generator": generator, "discriminator": discriminator}.items():
        model.save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
        (folder / name / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    return [folder / "generator", folder / "discriminator"]


def electra_there_and_back(config: Config, output: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    found = steps(config, 1)
    main(Options(load=config.train.output, output=output, format="electra"))
    return found


@pytest.mark.parametrize("padding", [7, pytest.param(0, marks=pytest.mark.long)])
def test_a_published_electra_there_and_back(datasets: dict[str, str], tmp_path: Path, padding: int) -> None:
    """One step at a rate of 0 leaves every weight as it was, in transformers' own class."""
    prefix = datasets["wordpiece"]
    size = Tokenizer.from_folder(f"{prefix}.tokenizer").vocab_size
    folders = write_electra(tmp_path, Path(prefix).parent / "tokenizer", size + padding)
    config = run_config(
        prefix,
        ELECTRA,
        objective={"main": ["rtd"]},
        optimizer={"lr": 1e-30, "lr_warmup_steps": 0, "weight_decay": 0.0},
        train={"initialize_from": list(map(str, folders)), "output": str(tmp_path / "run")},
    )
    batch, *_ = run_ranks(electra_there_and_back, 1, config, str(tmp_path / "out"))[0]
    assert batch[0][0] == 101 and (batch[1] == 103).sum() > 0 and batch[0].max() < size
    for name, kind in {"generator": ElectraForMaskedLM, "discriminator": ElectraForPreTraining}.items():
        before, after = (kind.from_pretrained(root / name) for root in (tmp_path, tmp_path / "out"))
        assert after.config.pad_token_id == 0 and after.config.vocab_size == size
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        encoded = tokenizer("the film was good", return_tensors="pt")
        assert encoded["input_ids"][0, [0, -1]].tolist() == [101, 102]
        with torch.no_grad():
            theirs, ours = (model.eval()(**encoded).logits[..., :size] for model in (before, after))
        assert torch.allclose(theirs, ours, atol=1e-5), name
        for key, weight in before.state_dict().items():
            is_vocabulary = weight.size(0) == size + padding
            # 1e-30 is nothing beside any number but 0.
            difference = after.state_dict()[key] - (weight[:size] if is_vocabulary else weight)
            assert difference.abs().max() < 1e-28, key


def test_a_vocabulary_that_is_said_must_be_the_datas(datasets: dict[str, str]) -> None:
    config = run_config(datasets["wordpiece"], {})
    assert config.model.mask_token_id == 103
    wrong = replace(config, model=replace(config.model, vocab_size=777, pad_token_id=1))
    assert with_vocabulary(wrong).model.vocab_size == 777 and with_vocabulary(wrong).model.pad_token_id == 0
    with pytest.raises(Exception, match=r"model\.vocab_size is 777, but that of the shards' tokenizer is \d+: set"):
        Corpus.open(with_vocabulary(wrong))
