"""The batch of any step of a run, found again without training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from metro_megatron.checkpoint.positions import known_position
from metro_megatron.config.file import load_config
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.steps import RunSamples
from metro_megatron.errors import UserError
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.journal import PassedOver


def past_step(
    config: Config, step: int, on_step: Callable[[int], object] = lambda done: None
) -> tuple[StepBatch, Corpus, str]:
    """The whole batch of a step, counted from 1 as metrics.jsonl counts, the corpus it is of, and why it is not trained
    on, if it is not.

    The samples are those of any layout; micro batches are those of one data-parallel rank. Where a step is as many
    samples as fit, those of the steps before it are counted, from the last one that the run has logged or saved on, and
    again where a phase begins; `on_step` hears of each. Raises UserError for a step that is not of the run, and as
    Corpus.open.
    """
    # Nothing is computed or probed here, so neither kernels, a device nor tasks must be able to.
    train = replace(config.train, fused="reference", probe_tasks="", probe_interval=0)
    found = problems(replace(config, train=train), config.parallel.model_ranks, "cuda")
    if not 1 <= step <= config.train.train_steps:
        found.append(f"--step {step}: must be 1 to train.train_steps {config.train.train_steps}")
    if found:
        raise UserError(found)
    corpus = Corpus.open(config)
    samples = RunSamples([corpus.train_index, *corpus.phase_indices], config)
    run = Path(config.train.output)
    is_run = (run / "run_config.yaml").is_file() and load_config(run / "run_config.yaml") == config
    first = samples.position(step - 1, lambda done: known_position(run, config, done) if is_run else (0, 0), on_step)
    data = PretrainingData(
        corpus.train_index,
        corpus.train_shards,
        config,
        word_starts=corpus.word_starts,
        phase_indices=corpus.phase_indices,
        phase_begins=samples.begins,
    )
    return data.step_batch(step - 1, first), corpus, PassedOver(run if is_run else None, config).why(step)
