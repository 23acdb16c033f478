"""The main job on real text, end to end: `make demo` and `make learn`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from metro_megatron.cli.command_line import run_tool
from tools.demo import stages
from tools.demo.journal import Journal
from tools.demo.runner import Runner

REPOSITORY = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Options:
    """Which, and where to."""

    preset: Literal["demo", "learn"]
    """demo takes at most 15 minutes on two cores; learn about ten minutes on one GPU, or a night on a CPU."""
    output: str
    """Folder of all results."""


def main(options: Options) -> None:
    """Pretrain a small METRO-LM on film reviews, export it, evaluate it and fine-tune it, in eight stages.

    Every command is shown. When the same line is given again, stages whose command and inputs have not changed are
    skipped and an interrupted one continues. Remove the output folder to start over.
    """
    root = Path(options.output).absolute()
    journal = Journal(root, REPOSITORY)
    shown = root.relative_to(REPOSITORY) if root.is_relative_to(REPOSITORY) else root
    num_cores = len(os.sched_getaffinity(0))
    chosen = stages.preset(options.preset, torch.cuda.device_count(), num_cores)
    Runner(journal, OFFLINE).run(stages.build_stages(chosen, shown, REPOSITORY))


if __name__ == "__main__":
    run_tool(main)
