"""Fine-tune a model on a benchmark's task, or on labelled examples of one's own."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from metro_megatron.cli.command_line import run_tool
from metro_megatron.commands import sweep
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.source import Source
from metro_megatron.finetune.tasks import TaskName


@dataclass(frozen=True)
class Options:
    """What to learn, from what, and how."""

    model: str
    """Folder written by tools/convert_checkpoint.py, or of another encoder that transformers reads."""
    task: TaskName
    """What to learn: of each text, or pair of texts, one of several classes (classification), any number of labels
    (multi_label) or a number (regression); a tag for each word (token); which of several choices is right
    (multiple_choice); where in a context an answer stands (span); or the task of a benchmark, by its name."""
    output: str
    """Folder to write: the trained model, its predictions (predictions.jsonl; of further sets predictions_NAME.jsonl)
    and metrics.json."""
    source: Source = field(default_factory=Source)
    recipe: Recipe = field(default_factory=Recipe)


def main(options: Options) -> None:
    """Fine-tune a model on a benchmark's task, or on labelled examples of one's own, and score it on others.

    Of GLUE, SuperGLUE and SQuAD --data is the folder as it is downloaded. Other files are tables with text (or text_a
    and text_b) and label, or with columns that are named. Linear warm-up and decay, Adam (0.9, 0.98), METRO Table 11.

    With `sweep` as the first word, options take several values each, and all combinations are run: sweep --help.
    """
    # Late, so that --help and mistakes do not wait for torch.
    import accelerate  # noqa: F401 - transformers' Trainer needs it, and does not say which extra brings it
    from transformers.utils import logging

    from metro_megatron.finetune.run import finetune

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    task = options.source.read(options.task)
    result = finetune(task, Path(options.model), Path(options.output), options.recipe)
    score = task.score_names[0]
    print(
        *(f"note: {remark}" for remark in result["remarks"]),
        f"made {options.output}: {task.makes}, predictions.jsonl, metrics.json; {score} {result[score]:.4f} on "
        f"{result['num_validation']} {task.unit} after {result['seconds']:.0f} s",
        f"next: {task.usage.format(output=options.output)}",
        "or:   the same command with another --seed or --learning_rate, or with --from_scratch to compare",
        sep="\n",
    )


run = partial(run_tool, main, sweep=sweep.main)
"""The console script."""
