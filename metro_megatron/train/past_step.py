"""The batch of any step of a run, found again without training."""

from collections.abc import Callable
from pathlib import Path

from metro_megatron.checkpoint.positions import known_position
from metro_megatron.config.file import load_config
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.loader import PretrainingData
from metro_megatron.errors import UserError
from metro_megatron.train.corpus import Corpus


def past_step(
    config: Config, step: int, on_step: Callable[[int], object] = lambda done: None
) -> tuple[StepBatch, Corpus]:
    """The whole batch of a step, counted from 1 as metrics.jsonl counts, and the corpus it is of.

    The samples are those of any layout; micro batches are those of one data-parallel rank. Where a step is as many
    samples as fit, the steps before it are made too, from the last one that the run has logged or saved; `on_step`
    hears of each. Raises UserError for a step that is not of the run, and as Corpus.open.
    """
    found = problems(config, config.parallel.model_ranks, "cuda")
    if not 1 <= step <= config.train.train_steps:
        found.append(f"--step {step}: must be 1 to train.train_steps {config.train.train_steps}")
    if found:
        raise UserError(found)
    corpus = Corpus.open(config)
    data = PretrainingData(corpus.train_index, corpus.train_shards, config)
    done, first = _known_position(config, step - 1)
    if config.train.global_batch_size:
        done, first = step - 1, (step - 1) * config.train.global_batch_size
    while True:
        batch = data.step_batch(done, first)
        if done == step - 1:
            return batch, corpus
        done, first = done + 1, batch.end
        on_step(done)


def _known_position(config: Config, step: int) -> tuple[int, int]:
    """known_position, if the run in its folder has this very configuration."""
    run = Path(config.train.output)
    plan = run / "run_config.yaml"
    return known_position(run, step) if plan.is_file() and load_config(plan) == config else (0, 0)
