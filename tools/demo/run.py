"""The main job on real text, end to end: `make demo` and `make learn`."""

import os
from pathlib import Path
from typing import Literal

import torch

from metro_megatron.cli.command_line import run_tool
from tools.demo import stages
from tools.demo.journal import Journal
from tools.demo.runner import Runner

REPOSITORY = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(preset: Literal["demo", "learn"], output: str) -> None:
    """Pretrain a small METRO-LM on film reviews, export it, evaluate it and fine-tune it, in eight stages.

    Every command is shown. When the same line is given again, stages whose command and inputs have not changed are
    skipped and an interrupted one continues. Remove the output folder to start over.

    Args:
        preset: demo takes at most 15 minutes on two cores; learn about ten minutes on one GPU, or a night on a CPU
        output: folder of all results
    """
    root = Path(output).absolute()
    journal = Journal(root, REPOSITORY)
    shown = root.relative_to(REPOSITORY) if root.is_relative_to(REPOSITORY) else root
    num_cores = len(os.sched_getaffinity(0))
    chosen = stages.preset(preset, torch.cuda.device_count(), num_cores)
    Runner(journal, OFFLINE).run(stages.build_stages(chosen, shown, REPOSITORY))


if __name__ == "__main__":
    run_tool(main)
