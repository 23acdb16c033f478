"""Pretrain, export, evaluate and note one run after the other, as long as there are runs that are not finished."""

import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated

from metro_megatron.checkpoint.files import tracked_step
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least, options_of, out_of_range
from metro_megatron.commands.probe import FIGURES as PROBED
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import OptimizerConfig
from metro_megatron.data.samples import NUM_SAMPLE_SPECIALS, build_sample_index
from metro_megatron.data.shards import open_shards
from metro_megatron.errors import UserError
from metro_megatron.files import locked
from metro_megatron.probing.folder import MANIFEST
from metro_megatron.train.curves import Run
from tools.campaign.arms import (
    ARMS,
    AUXILIARY_OF,
    COMMON,
    PlannedRun,
    Text,
    figure_of,
    planned_runs,
    step_flops,
)
from tools.campaign.commands import Call, Commands
from tools.campaign.rows import FIGURES, has_scores, keep_scores, keep_tasks, put_row, read_rows

FLOPS_PER_SECOND = 4.1e10
"""Of make demo's pretraining on two quiet cores: a guess where no row of this device is there."""
SECONDS_BESIDE = 90.0
"""Of a run, beside its steps: starting, saving, exporting, evaluating, probing."""
TIMED_STEPS = 200
VERSIONS = ("torch", "megatron-core", "transformers")


@dataclass(frozen=True)
class Options:
    """How much, and where."""

    budget: Annotated[float, at_least(0)] = 0.0
    """Model FLOPs of each run, by metro_megatron/plan/flops.py; 0: by minutes."""
    minutes: Annotated[float, at_least(0)] = 0.0
    """What each run takes for its steps on this device. METRO's first steps are timed once, and kept in ROOT/pace."""
    arms: list[str] = field(default_factory=lambda: [arm.name for arm in ARMS])
    """Arms to pretrain; the others' runs are left for later."""
    config: list[str] = field(default_factory=lambda: list(COMMON))
    """Configuration files of all arms, a later one over the earlier ones."""
    root: str = "runs/campaign"
    """Folder with tasks/, text/ and shards/; runs are written there."""
    results: str = "docs/results/campaign.csv"
    """Table that gets a row for each finished run."""
    seeds: Annotated[int, at_least(1)] = 5
    """METRO, ELECTRA and MLM are pretrained with seeds 1 to this one, other arms with 3 at most."""
    rates: list[float] = field(default_factory=lambda: [1e-3, 5e-4, 2e-3])
    """Peak learning rates, the same for each arm: seed 1 tries all, and each arm's best one on the validation text is
    that of its other seeds."""
    processes: Annotated[int, at_least(1)] = 1
    """Data-parallel processes of a run; no figure depends on them beyond rounding."""
    jobs: Annotated[int, at_least(1)] = 1
    """Runs beside each other; of more than one, each run's output goes to its folder. Two of one process each get more
    out of two cores than one of two."""


def main(options: Options) -> None:
    """Pretrain every arm with every seed at equal FLOPs; finished runs are skipped, an interrupted one goes on.

    All arms of a seed come before the next seed. A finished run is exported, evaluated on held-out text, asked the
    tasks with its weights as they are, and put into the table, and its scores are kept beside that; the exports stay
    for other judges. A run at its arm's chosen rate whose scores are not there is done again.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # a run in the background may ignore a hang-up
            signal.signal(number, signal.default_int_handler)
    check_arms(options.arms)
    check_rates(options.rates)
    if bool(options.budget) == bool(options.minutes):
        raise UserError("give either --budget, the FLOPs of each run, or --minutes of it")
    root = Path(options.root)
    try:
        with locked(root / "lock", wait=False):
            keep_tasks(root / "tasks" / MANIFEST, Path(options.results))
            text = read_text(root, options.config)
            commands = Commands()
            campaign(options if options.budget else with_budget(options, text, commands), text, commands)
    except BlockingIOError as error:
        raise UserError(f"{root}: another process runs this campaign; wait for it or end it") from error


def check_arms(arms: Sequence[str]) -> None:
    """Raises UserError for arms that are unknown, or whose auxiliary is of an arm that is not among them."""
    known = [arm.name for arm in ARMS]
    problems = [f"--arms {arm}: unknown; there are {', '.join(known)}" for arm in arms if arm not in known]
    problems += [
        f"--arms {arm}: its auxiliary is that of {source}; give {source}, too"
        for arm, source in AUXILIARY_OF.items()
        if arm in arms and source not in arms
    ]
    if problems:
        raise UserError(problems)


def check_rates(rates: Sequence[float]) -> None:
    """Raises UserError for rates that no run can have, for one that is there twice, and where there is none."""
    problems = [] if rates else ["--rates: give one, or several to choose from"]
    known = {option.name: option for option in options_of(OptimizerConfig)}
    for rate in rates:
        problems += [f"--rates: {problem}" for problem in out_of_range(known, {"lr": rate})]
    # As options are written: equal ones would be two runs in one folder.
    written = [f"{rate:g}" for rate in rates]
    problems += [f"--rates {rate}: given twice" for rate in dict.fromkeys(written) if written.count(rate) > 1]
    if problems:
        raise UserError(problems)


def read_text(root: Path, configs: Sequence[str] = COMMON) -> Text:
    """The training samples that the configuration of all arms makes of the shards. Raises UserError."""
    train = f"{root}/shards/train"
    shards = open_shards([train])
    seq_length = parse_config(["--config", *configs, "--data.train", train]).data.seq_length
    lengths = build_sample_index(shards, seq_length).length.astype(int) + NUM_SAMPLE_SPECIALS
    contents = "".join(shard.sha256 + shard.index_sha256 for shard in shards)
    sha256 = hashlib.sha256(contents.encode()).hexdigest()
    return Text(train, f"{root}/shards/validation", lengths, sha256, tuple(configs))


def with_budget(options: Options, text: Text, call: Call) -> Options:
    """FLOPs for minutes, by the pace of METRO's first steps, to two digits."""
    run = planned_runs(text, TIMED_STEPS * step_flops("metro", text), 1, options.rates[:1])[0]
    training = Path(options.root) / "pace" / run.name
    pretrain(run, training, options, call)
    curves = Run.read(training)
    seconds = curves.training[-1]["consumed_tokens"] / curves.tokens_per_second()
    budget = float(f"{60 * options.minutes * run.flops / seconds:.1e}")
    print(f"{options.minutes:g} minutes of this device are {budget:.1e} FLOPs ({training})", flush=True)
    return replace(options, budget=budget)


def campaign(options: Options, text: Text, call: Call) -> None:
    """Do what is not finished, in order, as many runs at a time as there are jobs; say before each how much is left.

    Where one fails, or this process is told to end, all end, and go on next time.
    """
    results = Path(options.results)
    with ThreadPoolExecutor(options.jobs) as threads:
        running: dict[Future[None], PlannedRun] = {}
        try:
            while True:
                rows = read_rows(results)
                planned = planned_runs(text, options.budget, options.seeds, options.rates, rows)
                runs = [run for run in planned if run.arm in options.arms]
                begun = {run.name for run in running.values()}
                finished = finished_runs(runs, rows, options) - begun
                left = [run for run in runs if run.name not in finished]
                ready = [run for run in left if run.name not in begun and finished.issuperset(run.waits_for)]
                for run in ready[: options.jobs - len(running)]:
                    number, hours = len(runs) - len(left) + len(running) + 1, hours_of(left, rows, run, options)
                    head = f"[{number}/{len(runs)}] {describe(run)}"
                    print(f"\n{head} | {len(left)} runs left, about {hours:.1f} hours", flush=True)
                    running[threads.submit(do, run, options, call)] = run
                if not running:
                    break
                ended = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
                ended.result()
                run = running.pop(ended)
                keep_scores(Path(options.root) / run.name, run.config.train.seed, results)
                row = row_of(run, options)
                put_row(results, row)
                print(f"{run.name}: done, validation {figure_of(run.arm)} {row['validation']:.4f}", flush=True)
        except BaseException:
            call.end()
            raise
    print(f"\nall {len(runs)} runs have their rows in {results}; the models are {options.root}/*/model")
    picture = results.with_suffix(".png")
    print(f"next: python -m tools.campaign.summary --results {results} --picture {picture}")


def finished_runs(runs: Sequence[PlannedRun], rows: Sequence[Mapping[str, str]], options: Options) -> set[str]:
    """Names of those that need not be done again: they have their row and, at a chosen rate, their scores beside it.
    A run whose auxiliary another is about to take has its model here, too, which rows of another machine do not bring.
    """
    noted, results = {row["run"] for row in rows}, Path(options.results)
    done = {run.name for run in runs if run.name in noted and (not run.is_chosen or has_scores(run.name, results))}
    pretrained = {run.name for run in runs if is_pretrained(run, options)}
    wanted = {run.auxiliary for run in runs if run.name not in done | pretrained and noted.issuperset(run.waits_for)}
    return done - (wanted - pretrained)


def do(run: PlannedRun, options: Options, call: Call) -> None:
    """Pretrain, export, evaluate and probe. Raises UserError where a command fails or training was interrupted."""
    root, folder, python = Path(options.root), Path(options.root) / run.name, sys.executable
    training = training_folder(run.name, options)
    run_command = partial(call, log=folder / "output.txt") if options.jobs > 1 else call
    pretrain(run, training, options, run_command)
    run_command([python, "tools/convert_checkpoint.py", "--load", str(training), "--output", str(folder / "model")])
    judged = ("--model", str(folder / "model"), "--device", run.config.train.device)
    for part, scores in (("validation", ()), ("test", ("--documents", str(folder / "scores" / "test.jsonl")))):
        text = ("--input", str(root / "text" / f"{part}.jsonl"), "--unigram_from", run.text.train)
        output = ("--output", str(folder / f"{part}.json"), *scores, "--sentences", "1")
        run_command([python, "tools/evaluate.py", *judged, *text, *output])
    # Its scores are where tools/compare_runs.py looks for them.
    tasks = ("--tasks", str(root / "tasks"), "--output", str(folder / "scores" / "tasks"))
    run_command([python, "tools/probe.py", *judged, *tasks, "--random_baseline", "false"])


def training_folder(run: str, options: Options) -> Path:
    return Path(options.root) / run / "pretraining"


def is_pretrained(run: PlannedRun, options: Options) -> bool:
    """Whether its last step's checkpoint is on this machine."""
    return tracked_step(training_folder(run.name, options)) == run.config.train.train_steps


def pretrain(run: PlannedRun, training: Path, options: Options, run_command: Callable[[Sequence[str]], None]) -> None:
    """Train to the last step, or go on to it. Raises UserError where it fails or was interrupted."""
    steps = run.config.train.train_steps
    if tracked_step(training) == steps:
        return
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes))
    # Its processes save at SIGTERM.
    patience = ("--shutdown-timeout", "100", "--signals-to-handle", "SIGTERM")
    frozen = ("--corruption.frozen_model", str(training_folder(run.auxiliary, options))) if run.auxiliary else ()
    run_command(
        [
            sys.executable,
            *torchrun,
            *patience,
            "pretrain_metro.py",
            *run.options,
            *frozen,
            "--train.output",
            str(training),
        ]
    )
    if tracked_step(training) != steps:
        raise UserError(f"{training}: interrupted; run the same command again to continue")


def row_of(run: PlannedRun, options: Options) -> dict[str, object]:
    """The row of a run that is done."""
    folder, config = Path(options.root) / run.name, run.config
    files = (folder / "validation.json", folder / "test.json", folder / "scores" / "tasks" / PROBED)
    validation, test, probed = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    curves = Run.read(training_folder(run.name, options))
    tokens = int(curves.training[-1]["consumed_tokens"]) if run.is_trained else 0
    return {
        "run": run.name,
        "arm": run.arm,
        "seed": config.train.seed,
        "lr": config.optimizer.lr if run.is_trained else 0.0,
        "steps": config.train.train_steps if run.is_trained else 0,
        "tokens": tokens,
        "flops": f"{run.flops:.4e}",
        "validation": round(validation[figure_of(run.arm)], 6),
        **{name: round(test[name], 6) for name in FIGURES if name in test},
        **{name: round(facts["score"], 6) for name, facts in probed["tasks"].items()},
        "seconds": round(tokens / curves.tokens_per_second(), 1),
        "device": device(run, options),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{package} {version(package)}" for package in VERSIONS)]
        ),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def describe(run: PlannedRun) -> str:
    config = run.config
    if not run.is_trained:
        return f"{run.name}: not trained"
    tokens = config.train.train_steps * config.train.global_batch_size * run.text.sample.tokens
    return (
        f"{run.name}: lr {config.optimizer.lr:g}, {config.train.train_steps:,} steps, {tokens / 1e6:.2f}M tokens, "
        f"{run.flops:.3e} FLOPs"
    )


def hours_of(runs: Sequence[PlannedRun], rows: Sequence[dict[str, str]], like: PlannedRun, options: Options) -> float:
    """How long they take at the pace of the rows that have this device, else at that of make demo."""
    here = device(like, options)
    done = [row for row in rows if row["device"] == here and float(row["seconds"])]
    paces = [options.jobs * float(row["flops"]) / float(row["seconds"]) for row in done]
    pace = median(paces) if paces else FLOPS_PER_SECOND
    return sum(run.flops / pace + SECONDS_BESIDE / options.jobs for run in runs) / 3600


def device(run: PlannedRun, options: Options) -> str:
    """The name of the processor and how many cores this process may use, or of the GPU; how many processes train."""
    beside = f" of each of {options.jobs} runs" if options.jobs > 1 else ""
    processes = f"{options.processes} process{'es' if options.processes > 1 else ''}{beside}"
    if run.config.train.device != "cpu":
        import torch  # --help does not wait for it

        return f"{torch.cuda.get_device_name()}, {processes}"
    found = re.search(r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = found[1].strip() if found else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {processes}"


def commit() -> str:
    """Of the checkout, with "-dirty" where tracked files other than results differ from it."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    is_dirty = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/results")
    return f"{head}-dirty" if is_dirty else head


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    run_tool(main)
