"""Ask an exported encoder, as it is, the tasks of a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.errors import UserError
from metro_megatron.evaluate.scores import write_scores
from metro_megatron.files import refuse_foreign, whole_folder
from metro_megatron.probing.folder import ProbeTask, read_tasks
from metro_megatron.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from metro_megatron.hf.modeling_metro import MetroModel
    from metro_megatron.probing.kinds import Scores

FIGURES, ITEMS = "probe.json", "items.jsonl"


@dataclass(frozen=True)
class Options:
    """Which encoder, and which tasks."""

    model: str
    """Folder written by tools/convert_checkpoint.py."""
    tasks: str
    """Folder written by tools/make_tasks.py."""
    output: str
    """Folder to write: probe.json, and items.jsonl with the score of every row."""
    only: list[str] = field(default_factory=list)
    """Names of the tasks to ask; none: all."""
    from_scratch: bool = False
    """Random weights instead of the model's, for comparison."""
    random_baseline: bool = True
    """Ask random weights of the same shape, too, and write their figures beside the model's."""
    seed: Annotated[int, at_least(0)] = 1
    """Seed of random weights."""
    layer: Annotated[int, at_least(0)] = 0
    """Layer of main whose hidden states are read, from 1; 0: the last one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""


def main(options: Options) -> None:
    """Score frozen features of an exported encoder on tasks: no weight of it changes.

    A feature is the mean of main's hidden states over the tokens of a text or a word. A linear classifier in
    closed form learns from them (ridge regression); retrieval is by cosine of mean-centred features. Equal weights and
    tasks give equal figures.
    """
    # Late, so that --help and mistakes do not wait for torch.
    import torch

    from metro_megatron.evaluate.frozen import item_scores, probe_all

    output, folder = Path(options.output), Path(options.model)
    refuse_foreign(output, (FIGURES, ITEMS))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU; use auto or cpu")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    tasks = read_tasks(Path(options.tasks), options.only)
    tokenizer = Tokenizer.from_folder(folder)

    def ask(from_scratch: bool) -> tuple[dict[str, Scores], int]:
        model = load_encoder(folder, from_scratch, options.seed)
        if options.layer > model.config.num_hidden_layers:
            raise UserError(
                f"--layer is {options.layer}, but the model has {model.config.num_hidden_layers}; give at most that"
            )
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the types
        return probe_all(model, tokenizer, tasks, options.layer, _say)

    scores, num_cut = ask(options.from_scratch)
    random: dict[str, Scores] = {}
    if options.random_baseline and not options.from_scratch:
        print("random weights:", flush=True)
        random, _ = ask(from_scratch=True)
    found = {task.name: figures(task, scores, random) for task in tasks}
    result = {
        "model": options.model,
        "from_scratch": options.from_scratch,
        "seed": options.seed,
        "layer": options.layer,
        "texts_cut": num_cut,
        "tasks": found,
    }
    with whole_folder(output, (FIGURES, ITEMS)) as unfinished:
        (unfinished / FIGURES).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write_scores(unfinished / ITEMS, item_scores(tasks, scores))
    print(table(found))
    print(f"made {options.output}: {FIGURES}, and {ITEMS} with a score for every row; {num_cut} texts were cut")
    print("next: the same command for another model; items with one id are of one row")


def load_encoder(folder: Path, from_scratch: bool, seed: int) -> MetroModel:
    """Main of an exported model in fp32, or random weights of its shape. Raises UserError for what is not an export."""
    from transformers import set_seed
    from transformers.utils import logging

    from metro_megatron.hf.folder import exported_config, whole_model
    from metro_megatron.hf.modeling_metro import MetroModel

    config = exported_config(folder)
    logging.disable_progress_bar()
    if from_scratch:
        set_seed(seed)
        return MetroModel(config)
    model: MetroModel = whole_model(MetroModel, folder)
    return model


def figures(task: ProbeTask, scores: dict[str, Scores], random: dict[str, Scores]) -> dict[str, Any]:
    """What probe.json says of a task."""
    metric = task.kind.metric
    baselines = dict(task.baselines)
    if random:
        baselines["random_weights"] = random[task.name].figures[metric]
    own = scores[task.name].figures
    return {"metric": metric, "score": own[metric], "figures": own, "baselines": baselines, "rows": len(task.test)}


def table(tasks: dict[str, Any]) -> str:
    """Every task's figure beside its baselines."""
    names = list(dict.fromkeys(name for facts in tasks.values() for name in facts["baselines"]))
    width = max(map(len, tasks))
    lines = [f"  {'':<{width}}  {'metric':<8}  {'model':>6}  " + "  ".join(f"{name:>6}" for name in names)]
    for task, facts in tasks.items():
        others = "  ".join(f"{facts['baselines'].get(name, float('nan')):>{max(6, len(name))}.3f}" for name in names)
        lines.append(f"  {task:<{width}}  {facts['metric']:<8}  {facts['score']:>6.3f}  {others}")
    return "\n".join(lines)


def _say(task: ProbeTask, scores: Scores) -> None:
    shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.figures.items())
    print(f"{task.name}: {shown}", flush=True)


run = partial(run_tool, main)
"""The console script."""
