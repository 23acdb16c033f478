"""Fine-tune a model on a benchmark's task, or on labelled examples of one's own."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

from metro_megatron.cli.command_line import is_first_process, run_tool, tool_command
from metro_megatron.commands import sweep
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.source import Source
from metro_megatron.finetune.tasks import TOGETHER, TaskName, TogetherName


@dataclass(frozen=True)
class Options:
    """What to learn, from what, and how."""

    model: str
    """Folder written by tools/convert_checkpoint.py, or of another encoder that transformers reads."""
    task: TaskName
    """What to learn: of each text, or pair of texts, one of several classes (classification), any number of labels
    (multi_label) or a number (regression); a tag for each word (token); which of several choices is right
    (multiple_choice); where in a context an answer stands (span); or the task of a benchmark, by its
    name. mnli_plus learns mnli, snli and anli at once."""
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
    if options.task in TOGETHER:
        _learn_together(options)
        return
    task = options.source.read(options.task)
    result = finetune(task, Path(options.model), Path(options.output), options.recipe)
    if not is_first_process():
        return
    files = ", ".join(["metrics.json", "predictions.jsonl", *(f"predictions_{name}.jsonl" for name in task.others)])
    scores = ", ".join(f"{name} {result[name]:.4f}" for name in result["score_names"])
    print(
        *(f"note: {remark}" for remark in result["remarks"]),
        f"made {options.output}: {task.makes}, {files}; {scores} on {result['num_validation']} {task.unit} after "
        f"{result['seconds']:.0f} s",
        f"next: {task.usage.format(output=options.output)}",
        "or:   the same command with another --seed or --learning_rate, or with --from_scratch to compare",
        sep="\n",
    )


def _learn_together(options: Options) -> None:
    from metro_megatron.finetune.multitask import finetune_together

    tasks = options.source.read_together(cast(TogetherName, options.task))
    result = finetune_together(tasks, Path(options.model), Path(options.output), options.recipe)
    if not is_first_process():
        return
    scores = [f"{name} {result['tasks'][name][task.score_names[0]]:.4f}" for name, task in tasks.items()]
    first = next(iter(tasks))
    notes = [f"note: {name}: {remark}\n" for name in tasks for remark in result["tasks"][name]["remarks"]]
    print(
        f"{''.join(notes)}made {options.output}: a folder for each of {', '.join(tasks)}, metrics.json; "
        f"{', '.join(scores)} after {result['seconds']:.0f} s\n"
        f"next: {tool_command('finetune')} --model {Path(options.output) / first} --task rte ..., a stage that starts "
        "from this encoder"
    )


run = partial(run_tool, main, report=is_first_process(), sweep=sweep.main)
"""The console script."""
