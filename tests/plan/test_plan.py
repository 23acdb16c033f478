"""tools/plan.py from the command line: text that ends with what to run next, numbers, and mistakes."""

import json
import re
from typing import get_args, get_type_hints

import pytest

from metro_megatron.cli.command_line import call_with_options
from metro_megatron.commands.plan import Options, main
from metro_megatron.errors import UserError
from metro_megatron.plan.gpus import GPUS


def test_every_gpu_can_be_asked_for() -> None:
    assert get_args(get_type_hints(Options)["gpu"]) == tuple(GPUS)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    call_with_options(main, ["--config", "base", "--gpus", "16", "--gpu", "h100"])
    shown = capsys.readouterr().out
    assert re.search(r"^main encoder, for fine-tuning +183,753,996$", shown, re.MULTILINE)
    assert "16 x h100, compute at 50% of 989 TFLOP/s" in shown
    assert "torchrun --nnodes 2 --nproc-per-node 8" in shown.partition("\nnext:\n")[2]
    assert max(map(len, shown.splitlines())) < 150


def test_numbers_of_a_frozen_auxiliary(capsys: pytest.CaptureFixture[str]) -> None:
    call_with_options(main, ["--config", "base", "--corruption.source", "frozen", "--json", "--runners_up", "1"])
    made = json.loads(capsys.readouterr().out)
    assert made["trained_auxiliary"]["flops_saved"] == pytest.approx(0.199, abs=0.001)
    assert made["parameters"]["trained"] == 183_753_996 + 769 + 128_000
    best, runner_up = made["layouts"]
    assert best["fits"] and best["loses"] == "" and runner_up["loses"] and made["configured"]["fits"]
    assert best["seconds_per_step"] == pytest.approx(sum(best["seconds"].values()))


def test_a_layout_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """XL's preset wants two tensor-parallel ranks: on one GPU the plan says so, and finds what can run."""
    call_with_options(main, ["--config", "xl", "--gpus", "1", "--gpu", "h200"])
    assert "not as configured: 1 processes, must be a multiple of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "v100"], "--gpu: expected one of a100-40g"),
        (["--gpus", "0"], "--gpus is 0, must be at least 1"),
        (["--gpus", "12"], "--gpus is 12, must be at most 8 or a multiple of it"),
        (["--efficiency", "1.5"], "--efficiency is 1.5, must be greater than 0 and at most 1"),
        (["--model.num_attention_heads", "7"], "num_attention_heads is 7, must divide model.hidden_size"),
        (["--train.phases", "{start: 90%}"], "a plan is of a run that is all in one phase"),
        (["--config", "xxl", "--gpus", "1", "--gpu", "a100-40g"], "no layout fits 1 x a100-40g: the least is 110"),
    ],
)
def test_mistakes_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call_with_options(main, argv)
