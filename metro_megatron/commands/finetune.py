"""Fine-tune an exported model on labelled texts."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError
from metro_megatron.finetune.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """What to learn, from what, and how."""

    model: str
    """Folder written by tools/convert_checkpoint.py."""
    task: Literal["classification"]
    """What to learn; classification gives every text, or pair of texts, one of the labels."""
    train_file: str
    """Labelled texts to learn from."""
    validation_file: str
    """Labelled texts to be scored on."""
    output: str
    """Folder to write: the classifier, its predictions on validation_file and metrics.json."""
    recipe: Recipe = field(default_factory=Recipe)


def main(options: Options) -> None:
    """Fine-tune an exported model on labelled texts and score it on others.

    Files are CSV, TSV or JSONL with text (or text_a and text_b) and label. Linear warm-up and decay, Adam
    (0.9, 0.98), METRO Table 11.
    """
    # Late, so that --help and mistakes do not wait for torch.
    import accelerate  # noqa: F401 - transformers' Trainer needs it, and does not say which extra brings it
    from transformers.utils import logging

    from metro_megatron.finetune.classification import classify
    from metro_megatron.finetune.examples import read_labelled_texts

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    files, problems = [], []
    for path in (options.train_file, options.validation_file):
        try:
            files.append(read_labelled_texts(Path(path)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    train, validation = files
    output = options.output
    result = classify(Path(options.model), train, validation, Path(output), options.recipe)
    print(
        f"made {output}: classifier, predictions.jsonl, metrics.json; accuracy {result['accuracy']:.4f} on "
        f"{result['num_validation']} texts after {result['seconds']:.0f} s\n"
        f'next: transformers.pipeline("text-classification", model="{output}", trust_remote_code=True)\n'
        "or:   the same command with another --seed or --learning_rate, or with --from_scratch to compare"
    )


run = partial(run_tool, main)
"""The console script."""
