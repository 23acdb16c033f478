"""Draw the curves of one or several runs."""

from pathlib import Path

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError
from metro_megatron.train.curves import Run, draw


def main(run: list[str], output: str) -> None:
    """Draw losses, replace rate and accuracies over the steps of one or several runs.

    Args:
        run: run folders (train.output of pretrain_metro.py), which may still be training
        output: picture to write: .png, .svg or .pdf
    """
    runs, problems = [], []
    for folder in run:
        try:
            runs.append(Run.read(Path(folder)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    draw(runs, Path(output))
    steps = ", ".join(f"{one.name} to step {int(one.training[-1]['step']):,}" for one in runs)
    print(f"made {output}: {steps}")


if __name__ == "__main__":
    run_tool(main)
