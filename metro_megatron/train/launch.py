"""From a command line to a running trainer: everything a user can get wrong is looked at first, in one place."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from metro_megatron import nvidia
from metro_megatron.checkpoint.files import TRIAL
from metro_megatron.checkpoint.resume import beginning
from metro_megatron.cli.command_line import describe_os_error, is_file_mistake, is_first_process
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import Config
from metro_megatron.data.vocabulary import with_vocabulary
from metro_megatron.errors import UserError
from metro_megatron.files import is_partial
from metro_megatron.train.processes import LOCK, claimed, end_with_parent, refuse_used_store, speak_or_wait

if TYPE_CHECKING:
    from metro_megatron.train.corpus import Corpus

Device = Literal["cpu", "cuda"]
LEAST_TORCH = (2, 10)
"""setup.cfg's."""


def pretrain(argv: Sequence[str]) -> None:
    """Train as the command line says; returns when the run is complete or SIGTERM has been answered.

    Raises UserError with every problem found before the processes are joined, on one process of a machine; on the
    others, after a while, without one.
    """
    end_with_parent()
    try:
        with ExitStack() as claim:
            _train(*_prepare(argv, claim))
    except UserError as error:
        raise UserError(speak_or_wait(error.problems)) from error
    except OSError as error:
        if not is_file_mistake(error):
            raise
        raise UserError(speak_or_wait([describe_os_error(error)])) from error


def _prepare(argv: Sequence[str], claim: ExitStack) -> tuple[Config, Corpus, Device]:
    """Everything that can be wrong before processes are joined; `claim` holds the run folder."""
    refuse_used_store()
    config = with_vocabulary(parse_config(argv))
    # Late, as all of torch here, so that --help and mistakes in options do not wait for it.
    from metro_megatron.config.problems import problems

    device = choose_device(config)
    found = problems(config, int(os.environ.get("WORLD_SIZE", 1)), device)
    if found:
        from metro_megatron.train.corpus import data_problems

        raise UserError([*found, *data_problems(config)])
    prepare_run_folder(Path(config.train.output))
    if is_first_process():
        claim.enter_context(claimed(Path(config.train.output)))
    beginning(config)
    import_megatron()
    optimizer, parallel, train = config.optimizer, config.parallel, config.train
    nvidia.refuse_missing(parallel.transformer_impl, optimizer.adam_impl, train.fp8_recipe, device)

    from metro_megatron.train.build import initial_weights
    from metro_megatron.train.corpus import Corpus

    corpus = with_replacements(Corpus.open(config))
    initial = initial_weights(config, corpus.tokenizer_folder)
    if initial:
        initial.refuse_misfits()
    return config, corpus, device


def with_replacements(corpus: Corpus) -> Corpus:
    """The corpus of a run whose frozen model or cache is known to fit it."""
    corruption = corpus.config.corruption
    if not corruption.frozen_model:
        return corpus.with_cache(Path(corruption.cache), "") if corruption.source == "cached" else corpus
    from metro_megatron.train.frozen_model import FrozenFolder, refuse_other_model

    if corruption.source == "cached":
        return corpus.with_cache(Path(corruption.cache), FrozenFolder(corruption.frozen_model).sha256)
    return replace(corpus, filled_by=refuse_other_model(corpus.config, corpus.tokenizer_folder).sha256)


def _train(config: Config, corpus: Corpus, device: Device) -> None:
    import torch

    from fused.dispatch import reference_only
    from metro_megatron.train.trainer import Trainer
    from metro_megatron.train.watchdog import watched

    with reference_only() if config.train.fused == "reference" else nullcontext(), watched(config) as watchdog:
        trainer = Trainer(config, corpus, torch.device(device), watchdog)
        try:
            trainer.checkpoints.check_folder()
            trainer.restore()
            gc.freeze()  # megatron-core collects around every save: what is here already is no garbage
            trainer.train()
        finally:
            trainer.close()


def choose_device(config: Config) -> Device:
    """The device that train.device means on this machine.

    Raises UserError for a torch that is too old, as pip does not look at what a checkout is run with, and when cuda is
    asked for and there is none.
    """
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        raise UserError(f"torch {torch.__version__} is older than {least}: pip install 'torch>={least}'")
    has_cuda = torch.cuda.is_available()
    if config.train.device == "cuda" and not has_cuda:
        raise UserError("train.device is cuda, but torch finds no GPU: set train.device to cpu, or check the driver")
    return "cuda" if has_cuda and config.train.device != "cpu" else "cpu"


def import_megatron() -> None:
    """Import megatron-core; what it says about libraries that are absent is left out.

    A Transformer Engine that does not load, of which megatron-core would die, is as absent
    (metro_megatron/nvidia.py).
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of its calls there
    nvidia.transformer_engine_fault()
    import megatron.core  # noqa: F401


def prepare_run_folder(run: Path) -> None:
    """Make the run folder, or accept one that holds a run.

    Raises UserError for a folder with other content.
    """
    run.mkdir(parents=True, exist_ok=True)
    others = (path for path in run.iterdir() if path.name != LOCK and not path.name.startswith(TRIAL))
    foreign = [path.name for path in others if not is_partial(path)]  # a start may have been killed while it wrote
    if foreign and not (run / "run_config.yaml").exists() and not any(run.glob("iter_*")):
        raise UserError(
            f"train.output {run} is not a run folder: it holds {', '.join(sorted(foreign)[:3])} but no "
            "run_config.yaml; choose an empty or a new folder"
        )
