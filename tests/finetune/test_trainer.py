"""What a recipe asks for, against transformers' own Trainer, torch and hand-computed cases."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.utils.class_weight import compute_class_weight
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from metro_megatron.errors import UserError
from metro_megatron.finetune.models import Head, build_model, read_config
from metro_megatron.finetune.rates import layer_rates
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.run import finetune
from metro_megatron.finetune.task import Outputs, Row
from metro_megatron.finetune.tasks.classification import Classification
from metro_megatron.finetune.trainer import ByLength, RecipeTrainer, class_weights, row_lengths
from tests.distributed import run_ranks
from tests.finetune.test_classification import good_or_bad
from tests.finetune.test_models import CONFIGS

SEQUENCE: Head = "sequence_classification"
RECIPE = Recipe(task_dropout=0.0, learning_rate=2e-3, batch_size=16, epochs=2, warmup_steps=2, seed=3, device="cpu")


def without_dropout(folder: Path, tmp_path: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    copy = tmp_path / "without_dropout"
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def task(num_train: int = 72, num_validation: int = 12) -> Classification:
    """Texts of 6 to 15 words."""
    both = [good_or_bad(count, seed) for count, seed in ((num_train, 1), (num_validation, 2))]
    for texts in both:
        texts.first[:] = [text + " the cat sees" * (i % 4) for i, text in enumerate(texts.first)]
    return Classification(*both)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those that the Trainer of a run logs."""
    found: list[float] = []
    log = Trainer.log

    def record(self: Trainer, logs: dict[str, float], *args: Any) -> None:
        found.extend([logs["loss"]] if "loss" in logs else [])
        log(self, logs, *args)

    monkeypatch.setattr(Trainer, "log", record)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.BertForSequenceClassification.from_pretrained(folder).state_dict()


def test_losses_and_weights_are_those_of_transformers_trainer(bert: Path, tmp_path: Path, losses: list[float]) -> None:
    """As run_glue.py: its classes from the library, its order of calls, dropout on."""
    ours = task()
    result = finetune(ours, bert, tmp_path / "ours", replace(RECIPE, task_dropout=0.1))
    mine = losses.copy()
    losses.clear()

    transformers.set_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    sets = [
        [{**tokenizer(text, truncation=True), "label": ("bad", "good").index(label)} for text, label in pairs]
        for pairs in (zip(texts.first, texts.labels, strict=True) for texts in (ours.train, ours.validation))
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        learning_rate=2e-3,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        weight_decay=0.01,
        warmup_steps=2,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        num_train_epochs=2,
        seed=3,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), *sets)
    trainer.train()
    assert len(mine) == len(losses) == 10
    assert mine == pytest.approx(losses, abs=1e-5)
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert [epoch["loss"] for epoch in result["epochs"]] == pytest.approx(evaluated, abs=1e-5)
    for name, weight in weights(tmp_path / "ours").items():
        torch.testing.assert_close(weight, model.state_dict()[name], atol=1e-5, rtol=0)


def test_parts_of_a_step_add_up_to_it(bert: Path, tmp_path: Path, losses: list[float]) -> None:
    """The last step of an epoch has 5 texts, in parts of 4 and 1."""
    folder = without_dropout(bert, tmp_path)
    found = []
    for parts in (1, 4):
        finetune(task(21), folder, tmp_path / "out", replace(RECIPE, gradient_accumulation_steps=parts))
        found.append(weights(tmp_path / "out"))
    assert losses[:4] == pytest.approx(losses[4:], abs=1e-5)
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], atol=2e-5, rtol=0)


def rank_of_a_run(folder: Path, output: Path, recipe: Recipe) -> dict[str, Any]:
    return finetune(task(64), folder, output, recipe)


@pytest.mark.long
@pytest.mark.parametrize("batching", ["random", "length"])
def test_two_processes_share_a_step(bert: Path, tmp_path: Path, batching: Any) -> None:
    folder, recipe = without_dropout(bert, tmp_path), replace(RECIPE, batching=batching, keep_best=True)
    alone = finetune(task(64), folder, tmp_path / "alone", recipe)
    both = run_ranks(rank_of_a_run, 2, folder, tmp_path / "both", recipe)
    assert both[0]["training"]["steps"] == alone["training"]["steps"] == 8
    for result in both:
        assert [epoch["loss"] for epoch in result["epochs"]] == pytest.approx(
            [epoch["loss"] for epoch in alone["epochs"]], abs=2e-4
        )
    assert [result["epoch"] for result in both] == [alone["epoch"]] * 2
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("alone", "both")
    )
    for mine, theirs in zip(one, two, strict=True):
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "both", "without_dropout"]


def test_batch_size_is_that_of_a_step() -> None:
    recipe = replace(RECIPE, batch_size=6, gradient_accumulation_steps=4)
    with pytest.raises(UserError, match="batch_size is 6, no multiple of 1 processes times .* 4; give a multiple of 4"):
        finetune(task(), Path("nowhere"), Path("nowhere"), recipe)


def test_rows_of_like_length_meet_and_answers_keep_their_order(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = without_dropout(bert, tmp_path)
    batches: list[list[int]] = []
    compute_loss = RecipeTrainer.compute_loss

    def record(self: RecipeTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            batches.append(inputs["attention_mask"].sum(1).tolist())
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", record)
    padding = {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    lengths = sorted(map(len, tokenizer(task(320).train.first, truncation=True)["input_ids"]))
    for batching in ("random", "length"):
        batches.clear()
        recipe = replace(RECIPE, batching=batching, learning_rate=0.0, epochs=1)
        finetune(task(320), folder, tmp_path / batching, recipe)
        assert sorted(itertools.chain(*batches)) == lengths
        padding[batching] = sum(max(batch) * len(batch) - sum(batch) for batch in batches)
    assert padding["length"] < padding["random"] / 4
    lines = [(tmp_path / name / "predictions.jsonl").read_text() for name in padding]
    assert lines[0] == lines[1]
    # Without training, answers are those of the texts one by one.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "length").eval()
    for text, line in zip(task(320).validation.first, lines[0].splitlines(), strict=True):
        chances = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits.softmax(-1)[0]
        assert json.loads(line)["probabilities"]["good"] == pytest.approx(chances[1].item(), abs=1e-5)


def test_lengths_are_of_texts_or_of_the_longest_candidate() -> None:
    assert row_lengths([{"input_ids": [1, 2, 3]}, {"input_ids": [[1], [1, 2]]}]) == [3, 2]
    by_length = ByLength([{"input_ids": [0] * n} for n in (5, 2, 4)])
    assert [len(row["input_ids"]) for row in by_length.rows] == [2, 4, 5]
    prediction = transformers.EvalPrediction(predictions=np.array([2, 4, 5]), label_ids=np.zeros(3))
    assert by_length.outputs(prediction)[0].tolist() == [5, 2, 4]


def test_classes_weigh_what_the_recipe_says(bert: Path, tmp_path: Path) -> None:
    config = read_config(bert, {"num_labels": 3})
    rows: list[Row] = [{"label": label} for label in (0, 0, 0, 2)]
    balanced = class_weights(replace(RECIPE, class_weights=["balanced"]), SEQUENCE, rows, config)
    assert balanced is not None and balanced.tolist() == pytest.approx([2 / 3, 1, 2])
    assert balanced[[0, 2]].tolist() == pytest.approx(
        compute_class_weight("balanced", classes=np.array([0, 2]), y=[0, 0, 0, 2])
    )
    tokens: list[Row] = [{"labels": [-100, 0, 1, 1, -100]}, {"labels": [2, 2, 0, 1]}]
    given = class_weights(replace(RECIPE, class_weights=["1", "2.5", ".5"]), "token_classification", tokens, config)
    assert given is not None and given.tolist() == [1, 2.5, 0.5]
    assert class_weights(RECIPE, SEQUENCE, rows, config) is None

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    model = build_model("token_classification", bert, config, False).eval()
    trainer = RecipeTrainer(RECIPE, given, model=model, args=arguments)
    labels = torch.tensor([[-100, 0, 1, 1, -100], [2, 2, 0, 1, 1]])
    inputs = {"input_ids": torch.randint(5, 300, (2, 5)), "labels": labels}
    plain = trainer.compute_loss(model, inputs)
    assert plain == model(**inputs).loss  # evaluation shows the model's own
    logits = model(**inputs).logits.log_softmax(-1)
    losses = [-logits[i, j, labels[i, j]] * given[labels[i, j]] for i, j in (labels != -100).nonzero()]
    model.training = True  # the outer module alone: dropout stays off
    total = sum(given[label] for label in labels[labels != -100])
    torch.testing.assert_close(trainer.compute_loss(model, inputs), sum(losses) / total)


@pytest.mark.parametrize(
    ("head", "given", "settings", "message"),
    [
        (SEQUENCE, ["1", "2"], {"num_labels": 3}, "class_weights has 2 numbers, but there are 3 classes"),
        (SEQUENCE, ["balanced"], {"num_labels": 1, "problem_type": "regression"}, "has not one of several classes"),
        ("multiple_choice", ["balanced"], {}, "has not one of several classes"),
        (SEQUENCE, ["balanced"], {"problem_type": "multi_label_classification"}, "has not one of several classes"),
    ],
)
def test_weights_that_fit_no_classes(bert: Path, head: Any, given: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        class_weights(replace(RECIPE, class_weights=given), head, [{"label": 1}], read_config(bert, settings))
    problems = replace(RECIPE, class_weights=["1", "0", "nan", "much"]).problems()
    assert len(problems) == 3 and "class_weights has 'much'; give balanced, or a number" in problems[2]


def electras_depth(name: str, num_layers: int) -> int:
    """google-research/electra, model/optimization.py: embeddings 0, layer i i + 1, the task's own num_layers + 2."""
    for layer in range(num_layers):
        if f"encoder.layer.{layer}." in name or name.startswith(f"layers.{layer}."):
            return layer + 1
    return num_layers + 2 if name.startswith("pooler") else 0


@pytest.mark.parametrize("name", ["metro", *CONFIGS])
def test_rates_fall_towards_the_input_as_electras(export_folder: Path, tmp_path: Path, name: str) -> None:
    if name == "metro":
        model = build_model("sequence_classification", export_folder, read_config(export_folder, {}), True)
    else:
        model = transformers.AutoModelForSequenceClassification.from_config(CONFIGS[name])
    encoder = model.base_model
    layers = model.config.num_hidden_layers
    wanted = {
        parameter: 2e-3 * 0.8 ** (layers + 2 - electras_depth(key, layers))
        for key, parameter in encoder.named_parameters()
    }
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=2e-3, use_cpu=True, report_to="none")
    trainer = RecipeTrainer(replace(RECIPE, layer_decay=0.8), model=model, args=arguments)
    groups = trainer.create_optimizer().param_groups
    found = {parameter: group for group in groups for parameter in group["params"]}
    assert found.keys() == set(model.parameters())
    for parameter, group in found.items():
        assert group["lr"] == pytest.approx(wanted.get(parameter, 2e-3))
    decayed = trainer.get_decay_parameter_names(model)
    for key, parameter in model.named_parameters():
        assert found[parameter]["weight_decay"] == (trainer.args.weight_decay if key in decayed else 0)
    assert groups[0]["lr"] == 2e-3 and layer_rates(encoder, 1.0).keys() <= wanted.keys()


class Moody(Classification):
    """Its first score is what the test says."""

    moods: Iterator[float]

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        self.seen.append(outputs[0])
        return {**super().scores(outputs, rows), "accuracy": next(self.moods)}


@pytest.mark.parametrize(("keep_best", "patience", "epochs", "epoch"), [(True, 0, 5, 2), (False, 2, 4, 4)])
def test_the_best_epoch_is_kept_and_training_may_end_early(
    bert: Path, tmp_path: Path, keep_best: bool, patience: int, epochs: int, epoch: int
) -> None:
    plain = task(32)
    moody = Moody(plain.train, plain.validation)
    moods = [0.1, 0.9, 0.5, 0.9, 0.2]
    object.__setattr__(moody, "moods", iter(moods))
    object.__setattr__(moody, "seen", [])
    recipe = replace(RECIPE, epochs=5, keep_best=keep_best, patience=patience)
    result = finetune(moody, bert, tmp_path / "out", recipe)
    assert len(result["epochs"]) == epochs and result["epoch"] == epoch
    assert result["accuracy"] == moods[epoch - 1]
    seen = moody.seen  # type: ignore[attr-defined]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    inputs = transformers.AutoTokenizer.from_pretrained(bert)(plain.validation.first[0], return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits[0].detach(), torch.tensor(seen[epoch - 1][0]))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_pdr_in_a_run_costs_a_second_forward_and_is_reported(
    bert: Path, tmp_path: Path, losses: list[float], precision: Any
) -> None:
    folder, recipe = without_dropout(bert, tmp_path), replace(RECIPE, precision=precision)
    plain = finetune(task(), folder, tmp_path / "out", recipe)
    nothing = finetune(task(), folder, tmp_path / "out", replace(recipe, pdr="symkl", pdr_radius=0.0))
    assert losses[:10] == losses[10:20] and plain["loss"] == nothing["loss"]
    assert plain["training"]["steps"] == 10
    assert plain["training"]["forwards"] * 2 == nothing["training"]["forwards"] == 20
    assert nothing["training"]["seconds"] > 0
    finetune(task(), folder, tmp_path / "out", replace(recipe, pdr="symkl", pdr_radius=0.02, pdr_weight=10.0))
    assert losses[20] > losses[0]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["recipe"]["pdr_radius"] == 0.02
