"""Fine-tune an exported model on labelled texts."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from metro_megatron.cli.command_line import run_tool
from metro_megatron.commands import sweep
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.tasks import TaskName, task_class


@dataclass(frozen=True)
class Options:
    """What to learn, from what, and how."""

    model: str
    """Folder written by tools/convert_checkpoint.py."""
    task: TaskName
    """What to learn: classification gives every text, or pair of texts, one of the labels; regression a number."""
    train_file: str
    """Labelled texts to learn from."""
    validation_file: str
    """Labelled texts to be scored on."""
    output: str
    """Folder to write: the trained model, its predictions on validation_file and metrics.json."""
    recipe: Recipe = field(default_factory=Recipe)


def main(options: Options) -> None:
    """Fine-tune an exported model on labelled texts and score it on others.

    Files are CSV, TSV or JSONL with text (or text_a and text_b) and label. Linear warm-up and decay, Adam
    (0.9, 0.98), METRO Table 11. With `sweep` as the first word, options take several values each, and all combinations
    are run (sweep --help).
    """
    # Late, so that --help and mistakes do not wait for torch.
    import accelerate  # noqa: F401 - transformers' Trainer needs it, and does not say which extra brings it
    from transformers.utils import logging

    from metro_megatron.finetune.run import finetune

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    task = task_class(options.task).read(Path(options.train_file), Path(options.validation_file))
    result = finetune(task, Path(options.model), Path(options.output), options.recipe)
    score = task.score_names[0]
    print(
        f"made {options.output}: {task.makes}, predictions.jsonl, metrics.json; {score} {result[score]:.4f} on "
        f"{result['num_validation']} {task.unit} after {result['seconds']:.0f} s\n"
        f"next: {task.usage.format(output=options.output)}\n"
        "or:   the same command with another --seed or --learning_rate, or with --from_scratch to compare"
    )


run = partial(run_tool, main, sweep=sweep.main)
"""The console script."""
