"""The batch of any step of a run, found again without training."""

import json
from collections.abc import Callable
from pathlib import Path

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
    samples as fit, the steps before it are made too, from the last one that the run has logged (with train.phases from
    the first); `on_step` hears of each. Raises UserError for a step that is not of the run, and as Corpus.open.
    """
    found = problems(config, config.parallel.model_ranks, "cuda")
    if not 1 <= step <= config.train.train_steps:
        found.append(f"--step {step}: must be 1 to train.train_steps {config.train.train_steps}")
    if found:
        raise UserError(found)
    corpus = Corpus.open(config)
    done, first, begins = 0, 0, [0]
    if size := config.train.global_batch_size:
        done, first = step - 1, (step - 1) * size
        begins = [start * size for start in config.phase_starts if start <= done]
    elif not config.train.phases:  # of which a log does not say where they began
        done, first = logged_position(config, step - 1)
    data = PretrainingData(
        corpus.train_index,
        corpus.train_shards,
        config,
        phase_indices=corpus.phase_indices,
        phase_begins=begins,
    )
    while True:
        batch = data.step_batch(done, first)
        if done == step - 1:
            return batch, corpus
        done, first = done + 1, batch.end
        on_step(done)


def logged_position(config: Config, step: int) -> tuple[int, int]:
    """(steps done, global position of the next sample) of the last line of training that the run of this very
    configuration has logged, up to `step`; (0, 0) if there is none."""
    run = Path(config.train.output)
    log = run / "metrics.jsonl"
    if not log.is_file() or not (run / "run_config.yaml").is_file() or load_config(run / "run_config.yaml") != config:
        return 0, 0
    best = 0, 0
    with log.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):  # cut short while the run goes on
                break
            figures = json.loads(line)
            if "consumed_samples" in figures and best[0] < figures["step"] <= step:
                best = int(figures["step"]), int(figures["consumed_samples"])
    return best
