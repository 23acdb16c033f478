"""One encoder learns several tasks: what is shared, which batches there are, and the stages that start from it."""

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from metro_megatron.cli.command_line import call_with_options, exit_code
from metro_megatron.commands.finetune import main
from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts
from metro_megatron.finetune.models import build_model, read_config
from metro_megatron.finetune.multitask import MultiTaskModel, TaskBatches, finetune_together
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.run import finetune
from metro_megatron.finetune.tasks.classification import Classification
from metro_megatron.finetune.tasks.regression import Regression
from tests.distributed import run_ranks
from tests.finetune.layouts import write_glue, write_nli
from tests.finetune.test_classification import good_or_bad

RECIPE = Recipe(learning_rate=5e-3, batch_size=16, epochs=4, warmup_steps=5, device="cpu", from_scratch=True)


def two_tasks(num_train: int = 160) -> dict[str, Any]:
    """Of "good" and "bad", which text has which, and a number that says the same of other texts."""
    numbers = []
    for count, seed in ((num_train // 2, 3), (16, 4)):
        texts = good_or_bad(count, seed)
        numbers.append(LabelledTexts(texts.first, None, [2.0 if label == "good" else -1.0 for label in texts.labels]))
    return {"words": Classification(good_or_bad(num_train, 1), good_or_bad(32, 2)), "numbers": Regression(*numbers)}


def test_batches_are_of_one_task_and_every_epoch_has_all_rows_once() -> None:
    lengths = [[5] * 50, [7] * 21, [3, 9] * 4]
    for by_length in (False, True):
        batches = TaskBatches(lengths, 8, by_length, seed=1)
        epochs = [list(batches), list(batches)]
        for epoch in epochs:
            assert len(epoch) == len(batches) == 7 + 3 + 1
            assert sorted(row for batch in epoch for row in batch) == list(range(79))
            tasks = [{(row >= 50) + (row >= 71) for row in batch} for batch in epoch]
            assert all(len(of_batch) == 1 for of_batch in tasks)
            assert Counter(task for of_batch in tasks for task in of_batch) == {0: 7, 1: 3, 2: 1}
            assert tasks != sorted(tasks, key=min)
        assert epochs[0] != epochs[1]
        assert list(TaskBatches(lengths, 8, by_length, seed=1)) == epochs[0]


def test_the_encoder_is_one_and_learns_from_every_task(export_folder: Path) -> None:
    """A step of each task moves the encoder as autograd on the plain models says, and the other head not at all."""
    torch.manual_seed(0)
    models = {
        name: build_model(head, export_folder, read_config(export_folder, settings), False).eval()
        for name, head, settings in (
            ("a", "sequence_classification", {"num_labels": 3}),
            ("b", "token_classification", {"num_labels": 2}),
        )
    }
    plain = copy.deepcopy(models["a"])
    both = MultiTaskModel(models)
    assert models["a"].metro is models["b"].metro is both.base_model
    encoder = sum(parameter.numel() for parameter in both.base_model.parameters())
    heads = [sum(p.numel() for p in model.parameters()) - encoder for model in models.values()]
    assert sum(parameter.numel() for parameter in both.parameters()) == encoder + sum(heads)
    ids, labels = torch.randint(5, 300, (2, 9)), torch.tensor([2, 0])
    loss = both(task="a", input_ids=ids, labels=labels)["loss"]
    assert loss == plain(ids, labels=labels).loss
    loss.backward()
    plain(ids, labels=labels).loss.backward()
    for key, parameter in models["a"].named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(key).grad)
    assert all(p.grad is None for name, p in models["b"].named_parameters() if not name.startswith("metro."))


def test_learns_both_and_writes_folders_that_load_and_start_a_next_stage(export_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "both"
    result = finetune_together(two_tasks(), export_folder, output, RECIPE)
    assert result["tasks"]["words"]["accuracy"] > 0.9 and result["tasks"]["numbers"]["spearman"] > 0.8
    assert json.loads((output / "metrics.json").read_text()) == result
    assert result["epochs"][-1].keys() == {"words_accuracy", "numbers_pearson"}
    assert result["training"]["steps"] == 4 * (10 + 5)
    models = [
        build_model("sequence_classification", output / name, read_config(output / name, {}), False)
        for name in result["tasks"]
    ]
    encoders = [model.base_model.state_dict() for model in models]
    assert all(map(torch.equal, encoders[0].values(), encoders[1].values()))
    for name, one in result["tasks"].items():
        assert json.loads((output / name / "metrics.json").read_text()) == one
        assert len((output / name / "predictions.jsonl").read_text().splitlines()) == one["num_validation"]
    # The next stage starts from that encoder, under a fresh head.
    still = replace(RECIPE, learning_rate=0.0, epochs=1, from_scratch=False)
    task = Classification(good_or_bad(16, 5), good_or_bad(16, 6))
    finetune(task, output / "numbers", tmp_path / "next", still)
    staged = build_model("question_answering", tmp_path / "next", read_config(tmp_path / "next", {}), False)
    assert all(map(torch.equal, encoders[0].values(), staged.base_model.state_dict().values()))
    for recipe in (replace(RECIPE, keep_best=True), replace(RECIPE, class_weights=["balanced"])):
        with pytest.raises(UserError, match="class_weights, keep_best and patience are for one task"):
            finetune_together(two_tasks(), export_folder, output, recipe)


def ranks_of_a_run(folder: Path, output: Path) -> Any:
    return finetune_together(two_tasks(96), folder, output, replace(RECIPE, epochs=2, pdr="symkl", layer_decay=0.9))


@pytest.mark.long
def test_processes_take_turns_at_the_batches(export_folder: Path, tmp_path: Path) -> None:
    both = run_ranks(ranks_of_a_run, 2, export_folder, tmp_path / "both")
    assert both[0]["epochs"] == both[1]["epochs"]
    assert both[0]["training"]["steps"] == 2 * (6 + 3)  # of 8 texts in each process
    assert both[0]["training"]["forwards"] == 2 * both[0]["training"]["steps"]


def test_the_preset_from_its_command_line(
    export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(export_folder), "--task", "mnli_plus", "--data", str(tmp_path / "nli"), "--device", "cpu"]
    argv += ["--output", str(tmp_path / "out"), "--epochs", "1", "--batch_size", "2", "--pdr", "symkl"]
    assert exit_code(lambda: call_with_options(main, argv)) == 2
    errors = capsys.readouterr().err
    assert "train.tsv: no such file" in errors and "snli_1.0_train.jsonl: no such file" in errors
    write_nli(write_glue(tmp_path / "nli"))
    assert exit_code(lambda: call_with_options(main, argv)) == 0
    assert "a folder for each of mnli, snli, anli" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(result["tasks"]) == ["mnli", "snli", "anli"]
    assert {"accuracy", "accuracy_mm"} <= result["tasks"]["mnli"].keys()
    model = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "anli", trust_remote_code=True)
    assert model.id2label == {0: "contradiction", 1: "entailment", 2: "neutral"}


def test_a_users_folders_are_not_replaced(export_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "words").mkdir(parents=True)
    (tmp_path / "out" / "words" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out/words holds 'notes.txt', which this tool has not written"):
        finetune_together(two_tasks(), export_folder, tmp_path / "out", RECIPE)
    assert (tmp_path / "out" / "words" / "notes.txt").read_text() == "mine"
