"""Text classification with transformers' Trainer, by METRO's recipe."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from metro_megatron.errors import UserError
from metro_megatron.files import refuse_foreign, whole_folder
from metro_megatron.finetune.examples import LabelledTexts, label_names
from metro_megatron.finetune.progress import Progress
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.scores import classification_scores
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.export import EXPORTED_FILES, finish_folder
from metro_megatron.hf.modeling_metro import MetroForSequenceClassification, MetroModel
from metro_megatron.tokenizer.tokenizer import TOKENIZER_FILES

OUTPUT_FILES = (*EXPORTED_FILES, "metrics.json", "predictions.jsonl")
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-6}


def classify(
    model_folder: Path, train: LabelledTexts, validation: LabelledTexts, output: Path, recipe: Recipe
) -> dict[str, Any]:
    """Fine-tune on train, score on validation, write the classifier, its predictions and metrics.json to `output`.

    Returns what metrics.json holds. The head is always fresh; with recipe.from_scratch all weights are. Raises
    UserError for a model folder that is not an export, labels that do not fit, or a foreign output folder.
    """
    start = time.monotonic()
    refuse_foreign(output, OUTPUT_FILES)
    problems = recipe.problems()
    if problems:
        raise UserError(problems)
    names = label_names(train, validation)
    config = _read_config(model_folder, names)
    tokenizer = read_tokenizer(model_folder, config, recipe.max_length)
    train_rows, train_cut = encode_texts(tokenizer, train, names)
    validation_rows, validation_cut = encode_texts(tokenizer, validation, names)
    print(
        f"{len(train)} training and {len(validation)} validation texts, {len(names)} classes; "
        f"{train_cut} and {validation_cut} cut to {tokenizer.model_max_length} tokens",
        flush=True,
    )
    set_seed(recipe.seed)
    model = _build_model(model_folder, config, recipe.from_scratch)
    progress = Progress()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=_arguments(recipe, scratch, len(train)),
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=_scores,
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logits = torch.from_numpy(trainer.predict(validation_rows).predictions)  # type: ignore[arg-type]
    result = {
        "task": "classification",
        "model": str(model_folder),
        **progress.epochs[-1],
        "labels": names,
        "epochs": progress.epochs,
        "num_train": len(train),
        "num_validation": len(validation),
        "num_cut": train_cut + validation_cut,
        "recipe": asdict(recipe),
        "seconds": time.monotonic() - start,
    }
    _write(output, trainer.model, model_folder, result, _prediction_lines(logits, validation, names))
    return result


def _read_config(folder: Path, names: list[str]) -> MetroConfig:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder that tools/convert_checkpoint.py has written") from None
    except ValueError as error:
        raise UserError(f"{path}: unreadable ({error}); export the model again") from error
    if settings.get("model_type") != MetroConfig.model_type:
        found = settings.get("model_type")
        raise UserError(f"{folder}: is a {found!r} model; give a folder that tools/convert_checkpoint.py has written")
    return MetroConfig.from_pretrained(
        folder,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type="single_label_classification",
    )


def read_tokenizer(folder: Path, config: MetroConfig, max_length: int) -> PreTrainedTokenizerFast:
    """The folder's tokenizer, cutting at max_length tokens (0: at the model's positions). Raises UserError."""
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}; export the model again")
    longest = config.max_position_embeddings
    if max_length > longest:
        raise UserError(f"max_length is {max_length}, but the model has {longest} positions; give at most {longest}")
    if 0 < max_length < 8:
        raise UserError(f"max_length is {max_length}; give at least 8, of which specials take up to 4")
    return PreTrainedTokenizerFast.from_pretrained(folder, model_max_length=max_length or longest)


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, texts: LabelledTexts, names: list[str]
) -> tuple[list[dict[str, Any]], int]:
    """Rows for the Trainer, and how many texts had to be cut.

    Text that spells a special token stays text, as in pretraining.
    """
    encoded = tokenizer(
        texts.first, texts.second, truncation=True, split_special_tokens=True, return_attention_mask=False
    )
    num_cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
    number = {name: i for i, name in enumerate(names)}
    rows = [
        {"input_ids": ids, "label": number[label]}
        for ids, label in zip(encoded["input_ids"], texts.labels, strict=True)
    ]
    return rows, num_cut


def _build_model(folder: Path, config: MetroConfig, from_scratch: bool) -> MetroForSequenceClassification:
    model = MetroForSequenceClassification(config)
    if not from_scratch:
        if not list(folder.glob("model*.safetensors")):
            raise UserError(f"{folder}: holds no model.safetensors; export the model again, or use --from_scratch")
        encoder = MetroModel.from_pretrained(folder, config=config, dtype=torch.float32, use_safetensors=True)
        model.metro.load_state_dict(encoder.state_dict())
    return model


def _arguments(recipe: Recipe, scratch: str, num_train: int) -> TrainingArguments:
    steps = -(-num_train // recipe.batch_size) * recipe.epochs
    warmup_steps = min(recipe.warmup_steps, steps // 2)
    if warmup_steps < recipe.warmup_steps:
        print(f"warm-up takes {warmup_steps} steps, half of all, instead of {recipe.warmup_steps}", flush=True)
    arguments = TrainingArguments(
        output_dir=scratch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip_grad,
        optim="adamw_torch",
        **ADAM,  # type: ignore[arg-type]
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        num_train_epochs=recipe.epochs,
        seed=recipe.seed,
        use_cpu=recipe.device == "cpu",
        dataloader_pin_memory=recipe.device != "cpu" and torch.cuda.is_available(),
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=max(1, steps // 20),
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the Trainer multiplies the batch by the GPUs it sees
    return arguments


def _scores(prediction: EvalPrediction) -> dict[str, float]:
    return classification_scores(np.asarray(prediction.predictions).argmax(-1), np.asarray(prediction.label_ids))


def _prediction_lines(logits: torch.Tensor, texts: LabelledTexts, names: list[str]) -> list[str]:
    lines = []
    for row, label in zip(logits.softmax(-1).tolist(), texts.labels, strict=True):
        prediction = names[max(range(len(names)), key=row.__getitem__)]
        probabilities = dict(zip(names, row, strict=True))
        lines.append(json.dumps({"label": label, "prediction": prediction, "probabilities": probabilities}))
    return lines


def _write(output: Path, model: Any, model_folder: Path, result: dict[str, Any], predictions: list[str]) -> None:
    with whole_folder(output, OUTPUT_FILES) as folder:
        model.save_pretrained(folder)
        finish_folder(folder)
        for name in TOKENIZER_FILES:
            (folder / name).write_bytes((model_folder / name).read_bytes())
        (folder / "predictions.jsonl").write_text("\n".join(predictions) + "\n", encoding="utf-8")
        (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
