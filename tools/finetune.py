"""Fine-tune an exported model on labelled texts."""

from pathlib import Path
from typing import Literal

from transformers.utils import logging

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError
from metro_megatron.finetune.classification import Recipe, classify
from metro_megatron.finetune.examples import read_labelled_texts


def main(
    model: str,
    task: Literal["classification"],
    train_file: str,
    validation_file: str,
    output: str,
    learning_rate: float = Recipe.learning_rate,
    batch_size: int = Recipe.batch_size,
    epochs: int = Recipe.epochs,
    warmup_steps: int = Recipe.warmup_steps,
    weight_decay: float = Recipe.weight_decay,
    clip_grad: float = Recipe.clip_grad,
    max_length: int = Recipe.max_length,
    seed: int = Recipe.seed,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    from_scratch: bool = False,
) -> None:
    """Fine-tune an exported model on labelled texts and score it on others.

    Files are CSV, TSV or JSONL with text (or text_a and text_b) and label. Linear warm-up and decay, Adam
    (0.9, 0.98), METRO Table 11.

    Args:
        model: folder written by tools/convert_checkpoint.py
        task: what to learn; classification gives every text, or pair of texts, one of the labels
        train_file: labelled texts to learn from
        validation_file: labelled texts to be scored on
        output: folder to write: the classifier, its predictions on validation_file and metrics.json
        learning_rate: peak learning rate; METRO tries 1e-5, 3e-5 and 5e-5 at base size
        batch_size: texts per step
        epochs: passes over train_file; METRO takes up to 10
        warmup_steps: steps of linear warm-up, at most half of all steps
        weight_decay: decoupled weight decay of matrices
        clip_grad: largest gradient norm; 0 switches clipping off
        max_length: tokens at which texts are cut; 0 takes as many as the model has positions
        seed: seed of the fresh head, the order of the texts and dropout
        device: auto takes a GPU where there is one
        from_scratch: start from random weights instead of the pretrained ones, for comparison
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    files, problems = [], []
    for path in (train_file, validation_file):
        try:
            files.append(read_labelled_texts(Path(path)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    train, validation = files
    recipe = Recipe(
        learning_rate=learning_rate,
        batch_size=batch_size,
        epochs=epochs,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        max_length=max_length,
        seed=seed,
        device=device,
        from_scratch=from_scratch,
    )
    result = classify(Path(model), train, validation, Path(output), recipe)
    print(
        f"made {output}: classifier, predictions.jsonl, metrics.json; accuracy {result['accuracy']:.4f} on "
        f"{result['num_validation']} texts after {result['seconds']:.0f} s\n"
        f'next: transformers.pipeline("text-classification", model="{output}", trust_remote_code=True)\n'
        "or:   the same command with another --seed or --learning_rate, or with --from_scratch to compare"
    )


if __name__ == "__main__":
    run_tool(main)
