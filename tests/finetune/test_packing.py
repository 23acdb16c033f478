"""Packed rows: losses, gradients and answers are those of padded ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metro_megatron.errors import UserError
from metro_megatron.finetune.models import build_model, read_config
from metro_megatron.finetune.packing import first_fit, pack_rows
from metro_megatron.finetune.run import finetune
from tests.finetune.test_trainer import RECIPE, task, without_dropout
from tests.hf.pair import VARIANTS, variant, write_export


def test_texts_lie_in_rows_of_the_longest() -> None:
    assert first_fit([3, 9, 6, 4, 2, 3]) == ([15, 0, 9, 18, 25, 22], 3)
    assert first_fit([5, 5]) == ([0, 5], 2)


@pytest.mark.parametrize(
    "name", [name if name in ("METRO", "TUPE") else pytest.param(name, marks=pytest.mark.long) for name in VARIANTS]
)
def test_heads_see_no_difference(tmp_path: Path, name: str) -> None:
    folder = write_export(tmp_path, variant(name))
    lengths = [11, 3, 7, 20, 4, 5]
    ids, mask = torch.randint(5, 300, (6, 24)), torch.arange(24) < torch.tensor(lengths)[:, None]
    inputs = {"input_ids": ids.where(mask, 1), "attention_mask": mask.long()}
    labels = torch.randint(2, (6, 24)).masked_fill(~mask, -100)
    heads: dict[Any, dict[str, Any]] = {
        "sequence_classification": {"labels": labels[:, 0]},
        "token_classification": {"labels": labels},
        "question_answering": {
            "start_positions": torch.tensor([0, 1, 2, 19, 3, 4]),
            "end_positions": torch.tensor([5, 1, 3, 19, 3, 0]),
            "p_mask": torch.zeros_like(ids),  # padding is no position then
        },
        "multiple_choice": {"labels": torch.tensor([1, 0])},
    }
    for head, targets in heads.items():
        model = build_model(head, folder, read_config(folder, {}), False).eval()
        given = {key: x.unflatten(0, (2, 3)) if head == "multiple_choice" else x for key, x in inputs.items()}
        padded = model(**given, **targets)
        padded.loss.backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        rows: list[torch.Size] = []
        model.metro.encoder.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0].shape))
        pack_rows(model.metro)
        packed = model(**given, **targets)
        packed.loss.backward()
        assert rows[0][:2] == (3, 20)
        torch.testing.assert_close(packed.loss, padded.loss, atol=1e-6, rtol=1e-6)
        for key, gradient in gradients.items():
            torch.testing.assert_close(model.get_parameter(key).grad, gradient, atol=1e-6, rtol=1e-4)
        full = {key: x[..., :1, :] for key, x in given.items()} if head == "multiple_choice" else {"input_ids": ids}
        assert torch.isfinite(next(iter(model(**full).values()))).all()


def test_a_run_of_packed_rows(export_folder: Path, tmp_path: Path) -> None:
    folder = without_dropout(export_folder, tmp_path)
    found = [
        finetune(task(40), folder, tmp_path / "out", replace(RECIPE, batching=batching, pdr=pdr, pdr_radius=0.0))
        for batching, pdr in (("random", "none"), ("packed", "none"), ("packed", "symkl"))
    ]
    losses = [[epoch["loss"] for epoch in result["epochs"]] for result in found]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_others_encoders_read_one_text_in_a_row(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batching is packed, but encoders of type 'bert' read one text in a row"):
        finetune(task(), bert, tmp_path / "out", replace(RECIPE, batching="packed"))
