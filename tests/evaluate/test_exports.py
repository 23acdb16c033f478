"""Runs with other objectives than METRO's, from training over a verified export to evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from metro_megatron.commands.evaluate import describe, load_pair
from metro_megatron.data.samples import build_sample_index
from metro_megatron.evaluate.intrinsic import evaluate, guess, held_out_text, masked_samples
from metro_megatron.evaluate.sentences import legend, show
from metro_megatron.hf.export import write_hf_folder
from metro_megatron.hf.modeling_metro import (
    MetroForAuxiliaryMaskedLM,
    MetroForMaskedLM,
    MetroForReplacedTokenDetection,
)
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.vocabulary import MASK_ID, NUM_SPECIALS
from tests.distributed import run_ranks
from tests.evaluate.test_intrinsic import DOCUMENTS
from tests.hf.pair import MODEL, trainer_tensors, write_tokenizer
from tests.hf.test_convert_checkpoint import convert_all, train_two_steps
from tests.parity.small_run import VOCAB_SIZE, small_config

RATE = 0.2
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mlm": {"main": ["mlm"], "mask_probability": 0.3},
    "rtd": {"main": ["rtd"], "mask_probability": RATE},
    "cloze": {"main": ["cloze", "scl"]},
    "full_clm": {"main": ["rtd", "clm"], "clm": "mixture"},
}


def train_and_export(root: Path) -> None:
    """On a lone rank: a folder of every objective."""
    configs = [
        small_config(
            train={"output": str(root / name)},
            objective=objective,
            corruption={"source": "none" if name == "mlm" else "auxiliary"},
        )
        for name, objective in OBJECTIVES.items()
    ]
    for name in OBJECTIVES:
        write_tokenizer(root / name / "tokenizer")
    train_two_steps(configs)
    convert_all([root / name for name in OBJECTIVES])


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each, and one of METRO's losses without auxiliary, as of a run against a frozen one."""
    root = tmp_path_factory.mktemp("exports")
    run_ranks(train_and_export, 1, root)
    folders = {name: root / name / "hf" for name in OBJECTIVES}
    tensors = {name: tensor for name, tensor in trainer_tensors().items() if not name.startswith("aux.")}
    folders["alone"] = root / "alone"
    write_hf_folder(root / "alone", tensors, replace(MODEL, auxiliary_num_layers=0), root / "rtd" / "tokenizer", {})
    return folders


HEADS = {"mlm": {"mlm"}, "rtd": {"rtd"}, "cloze": {"cloze"}, "full_clm": {"rtd", "clm"}, "alone": {"rtd", "clm"}}
FIGURES = {
    "mlm": {"mlm_loss", "mlm_accuracy"},
    "rtd": {"aux_loss", "rtd_loss", "rtd_auc"},
    "cloze": {"aux_loss", "cloze_loss", "cloze_accuracy"},
    "full_clm": {"aux_loss", "rtd_loss", "clm_loss"},
    "alone": {"rtd_loss", "clm_loss"},
}


@pytest.mark.parametrize("name", HEADS)
def test_an_export_has_the_heads_of_its_objective_and_is_measured_by_them(exports: dict[str, Path], name: str) -> None:
    folder = exports[name]
    model = load_pair(folder)
    has_auxiliary = name not in ("mlm", "alone")
    heads = {part.removesuffix("_head") for part, _ in model.named_children() if part.endswith("_head")}
    assert heads == HEADS[name] | ({"auxiliary"} if has_auxiliary else set())
    card = (folder / "README.md").read_text()
    assert ("auxiliary and main encoder" in card) == has_auxiliary
    assert ("AutoModelForMaskedLM" in card) == bool(HEADS[name] & {"clm", "mlm"})

    text = held_out_text(DOCUMENTS, Tokenizer.from_folder(folder))
    counts = np.bincount(text.tokens, minlength=VOCAB_SIZE)
    figures = evaluate(model, text, counts, 100, 1, lambda done, total: None)
    trivial = {"unigram_loss", "rtd_trivial_loss"}
    losses = {figure for figure in figures if figure.endswith("_loss")} - trivial
    assert FIGURES[name] <= figures.keys() and losses == {one for one in FIGURES[name] if one.endswith("_loss")}
    assert ("random tokens" in describe(model.config, figures, 1, 0)) == (name == "alone")
    assert ("{...}" in legend(model.config)) == ("rtd" in heads)
    (shown,) = show(model, folder, ["the old cat sees a green bird, it finds the house."], counts, seed=3)
    assert (
        bool(shown.masks) == (name != "alone")
        and shown.filled.count("[") >= 1
        and (shown.corrected is None) == ("rtd" not in heads)
    )


def test_classes_load_what_fits_and_say_what_is_missing(exports: dict[str, Path], remote_code: None) -> None:
    encoder, report = transformers.AutoModel.from_pretrained(
        exports["cloze"], trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] | report["unexpected_keys"] and encoder.config.objectives == ["cloze", "scl"]
    with pytest.raises(ValueError, match="has no head of clm or mlm"):
        MetroForMaskedLM.from_pretrained(exports["rtd"])
    with pytest.raises(ValueError, match="AutoModelForMaskedLM"):
        transformers.AutoModelForMaskedLM.from_pretrained(exports["rtd"], trust_remote_code=True)
    with pytest.raises(ValueError, match="pretrained with mlm and has no head of rtd"):
        MetroForReplacedTokenDetection.from_pretrained(exports["mlm"])
    with pytest.raises(ValueError, match="no auxiliary encoder"):
        MetroForAuxiliaryMaskedLM.from_pretrained(exports["alone"])


def test_a_masked_language_model_fills_masks_itself(exports: dict[str, Path], remote_code: None) -> None:
    auto = transformers.AutoModelForMaskedLM
    model, report = auto.from_pretrained(exports["mlm"], trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    whole = load_pair(exports["mlm"])
    ids = torch.tensor([[0, 9, MASK_ID, 12, 2]])
    expected = whole.eval()(ids)
    torch.testing.assert_close(model.eval()(ids).logits, expected.mlm_logits)
    assert torch.equal(expected.noised_input_ids, ids)
    text = held_out_text(DOCUMENTS, Tokenizer.from_folder(exports["mlm"]))
    batch = masked_samples(text, build_sample_index([text], 64), np.arange(4), seed=1)
    found = guess(whole, batch)
    assert torch.equal(found.noised, batch.ids.masked_fill(batch.is_masked, MASK_ID))
    torch.testing.assert_close(found.logits["mlm"], whole(found.noised, batch.is_real).mlm_logits[batch.is_masked])


def test_what_cloze_offers(exports: dict[str, Path]) -> None:
    """The original first, the replacement among the three, and no id twice; the loss is that of its three scores."""
    model = load_pair(exports["cloze"]).eval()
    text = held_out_text(DOCUMENTS, Tokenizer.from_folder(exports["cloze"]))
    batch = masked_samples(text, build_sample_index([text], 64), np.arange(30), seed=1)
    found = guess(model, batch)
    with torch.no_grad():
        scores = model(batch.ids, batch.is_real, noised_input_ids=found.noised).cloze_logits[batch.is_masked]
    given = found.logits["cloze"]
    place = (scores[:, None] - given[:, :, None]).abs().argmin(-1)
    originals, sampled = batch.ids[batch.is_masked], found.noised[batch.is_masked]
    assert torch.equal(place[:, 0], originals)
    assert bool((place == sampled[:, None]).any(1).all()) and all(len(set(row)) == 3 for row in place.tolist())
    assert int(place[:, 1:].unique().numel()) > 20
    figures = evaluate(model, text, np.ones(VOCAB_SIZE, np.int64), 100, 1, lambda done, total: None)
    everything = masked_samples(text, index := build_sample_index([text], 64), np.arange(len(index)), seed=1)
    logits = guess(model, everything).logits["cloze"]
    expected = functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    assert figures["cloze_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_specials_replace_no_token_however_likely_the_auxiliary_holds_them(exports: dict[str, Path]) -> None:
    """As in training; the configuration says at which share of masks."""
    model = load_pair(exports["rtd"]).eval()
    assert model.config.mask_probability == RATE and model.config.unsampled_ids == [0, 1, 2, 4, 3]
    with torch.no_grad():
        model.auxiliary_head.decoder.bias[:NUM_SPECIALS] = 50.0
    text = held_out_text(DOCUMENTS, Tokenizer.from_folder(exports["rtd"]))
    index = build_sample_index([text], 64)
    batch = masked_samples(text, index, np.arange(40), seed=1, mask_probability=RATE)
    assert float(batch.is_masked.sum() / index.length[:40].sum()) == pytest.approx(RATE, abs=0.01)
    assert int(guess(model, batch).noised[batch.is_masked].min()) >= NUM_SPECIALS
    with torch.no_grad():
        noised = model(batch.ids.masked_fill(batch.is_masked, MASK_ID), batch.is_real).noised_input_ids
    assert int(noised[batch.is_masked].min()) >= NUM_SPECIALS


def test_without_auxiliary_masks_are_filled_with_any_words(exports: dict[str, Path]) -> None:
    text = held_out_text(DOCUMENTS, Tokenizer.from_folder(exports["alone"]))
    index = build_sample_index([text], 40)
    batch = masked_samples(text, index, np.arange(len(index)), seed=1)
    filled = guess(load_pair(exports["alone"]), batch).noised[batch.is_masked]
    assert int(filled.min()) >= NUM_SPECIALS and len(filled) > 1000
    counts = filled.bincount(minlength=VOCAB_SIZE)[NUM_SPECIALS:].double()
    expected = len(filled) / len(counts)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - len(counts)) < 4 * (2 * len(counts)) ** 0.5
