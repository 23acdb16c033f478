"""Do a step of a run once more, on this machine alone, and show what it read and the loss of every token."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from metro_megatron.cli.command_line import run_tool, tool_command
from metro_megatron.cli.options import at_least
from metro_megatron.cli.progress import CountLines


@dataclass(frozen=True)
class Options:
    """Which step, and where to."""

    run: str
    """Run folder (train.output of pretrain_metro.py); its datasets must be where its run_config.yaml says."""
    step: Annotated[int, at_least(1)]
    """A step, counted from 1 as metrics.jsonl does."""
    output: str = ""
    """HTML file to write; default: replay_STEP.html in the folder where this is started."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    text: bool = False
    """Print every mask with its losses, too."""


def main(options: Options) -> int:
    """Do a step of a run once more, on this machine alone, and show what it read and the loss of every token.

    Whatever layout the run has: order, masks, replacements and dropout are the same. It begins from the nearest
    checkpoint before the step, and compares all lines of metrics.jsonl that it passes. Nothing is written into the run
    folder. Exit code 1 where something else was read than in the run.
    """
    # Late, so that --help and mistakes do not wait for torch.
    import torch

    from metro_megatron.evaluate.token_losses import Words, page_of, text_of
    from metro_megatron.files import whole_files
    from metro_megatron.tokenizer.tokenizer import Tokenizer
    from metro_megatron.train.launch import import_megatron
    from metro_megatron.train.replay import replay

    import_megatron()
    is_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    run, output = Path(options.run), Path(options.output or f"replay_{options.step}.html")
    lines = CountLines("{:,} steps done")
    with whole_files([output]) as (file,):  # a place that cannot be written is found before the work
        found = replay(run, options.step, torch.device("cuda" if is_cuda else "cpu"), lambda done, _: lines.show(done))
        words = Words(Tokenizer.from_folder(run / "tokenizer"))
        facts = list(_facts(found))
        print(*facts, sep="\n")
        if options.text:
            for sample in found.samples:
                print(*text_of(sample, words), sep="\n")
        page = page_of(found.samples, words, found.weights, f"Step {options.step} of {run.name}", facts)
        file.write(page.encode())
    print(
        f"made {output}: {len(found.samples)} samples with the loss of every token\n"
        f"next, the documents they are of:\n  {tool_command('which_documents')} --run {run} --step {options.step}"
    )
    return int(any(line.is_same is False for line in found.lines))


def _facts(found) -> Iterator[str]:
    yield from found.remarks
    yield f"begun from {found.begin}" if found.begin else "begun from the beginning of the run"
    for line in found.lines:
        read = {True: "same documents, masks and replacements", None: "the run has noted no digest"}.get(
            line.is_same, "OTHER documents, masks or replacements than in the run"
        )
        losses = ", ".join(f"{name} {value:.1e}" for name, value in line.differences.items())
        yield f"line of step {line.step}: {read}; losses differ relatively by {losses}"
    if not found.lines:
        yield "compared with nothing: the run has logged no line whose steps begin and end with this configuration"


run = partial(run_tool, main)
"""The console script."""
