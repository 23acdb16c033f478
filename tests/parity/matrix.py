"""Every way to spread a run, each against one process: `make parity` tries all, `pairs` are those that tests try.

python -m tests.parity.matrix --output FILE tries what FILE does not know as equal, and ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

from metro_megatron.config.schema import Config
from tests.distributed import run_ranks
from tests.parity.small_run import Record, small_config, train_in_layouts

LAYERS = 9
"""One more than the largest pipeline has chunks."""
SAMPLES, STEPS = 12, 3
CHOICES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "vpp": (1, 2),
    "sequence_parallel": (False, True),
    "recompute": ("none", "selective", "full"),
    "overlap": (False, True),
    "stages": ("balanced", "first heavy"),
    "rows": ("packed", "padded"),
}
EQUAL = "equal"
Case = tuple[Any, ...]
"""A choice of each."""


def every_case() -> list[Case]:
    """All that a configuration may be, with dropout; what makes no difference is in one of its two forms."""
    cases = (dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values()))
    return [tuple(case.values()) for case in cases if _is_sound(case)]


def _is_sound(case: dict[str, Any]) -> bool:
    is_alone = case["pp"] == 1 and (case["vpp"] > 1 or case["stages"] != "balanced")
    return not is_alone and not (case["tp"] == 1 and case["sequence_parallel"])


@cache
def pairs() -> list[Case]:
    """Few cases in which every pair of choices occurs that occurs at all: a greedy covering array.

    What few processes can show they show: cases of 2 come first, then those of 4, 8 and 16 for what is left.
    """
    left = set().union(*map(_pairs_of, every_case()))
    chosen: list[Case] = []
    for most in (2, 4, 8, 16):
        cases = [case for case in every_case() if world_size(case) <= most]
        while new := max((left & _pairs_of(case) for case in cases), key=len):
            chosen.append(next(case for case in cases if left & _pairs_of(case) == new))
            left -= new
    assert not left
    return chosen


def _pairs_of(case: Case) -> set[tuple[tuple[int, Any], ...]]:
    return set(combinations(enumerate(case), 2))


def world_size(case: Case) -> int:
    tp, pp, *_ = case
    return int(tp * pp)


def config_of(case: Case) -> Config:
    """A pair of 2 and LAYERS layers with dropout."""
    chosen = dict(zip(CHOICES, case, strict=True))
    config, chunks = alone(), chosen["pp"] * chosen["vpp"]
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=chosen["tp"],
        pipeline_model_parallel_size=chosen["pp"],
        virtual_pipeline_model_parallel_size=chosen["vpp"],
        pipeline_model_parallel_layout=_first_heavy(chunks) if chosen["stages"] == "first heavy" else "",
        sequence_parallel=chosen["sequence_parallel"],
        recompute=chosen["recompute"],
        overlap=chosen["overlap"],
    )
    return replace(config, parallel=parallel, data=replace(config.data, row_format=chosen["rows"]))


def _first_heavy(chunks: int) -> str:
    """All layers but one for each of the others."""
    return "E" + "t" * (LAYERS - chunks + 1) + "|t" * (chunks - 1) + "L"


def alone() -> Config:
    model = {"num_layers": LAYERS, "hidden_dropout": 0.1, "attention_dropout": 0.1, "auxiliary_dropout": "train"}
    return small_config(model=model, train={"global_batch_size": SAMPLES})


def run_cases(cases: list[Case]) -> list[Record]:
    """Of cases that need as many processes."""
    (size,) = set(map(world_size, cases))
    return run_ranks(train_in_layouts, size, list(map(config_of, cases)), STEPS, timeout=600)[0]


def reference() -> Record:
    return run_ranks(train_in_layouts, 1, [alone()], STEPS)[0][0]


def missing(output: Path) -> Iterator[Case]:
    """Cases that the file does not know as equal."""
    known = set()
    if output.is_file():
        lines = map(json.loads, output.read_text().splitlines())
        known = {tuple(line["case"]) for line in lines if line["said"] == EQUAL}
    # In an order that is drawn, so that what has been tried when it is ended is a random sample of all.
    yield from (case for case in random.Random(0).sample(every_case(), len(every_case())) if case not in known)


def main() -> int:
    # Late: pytest's rules, which a test file has, are for assertions.
    from tests.parity.test_layouts import assert_same

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="lines of what was tried; read to go on from there")
    output = parser.parse_args().output
    untried = list(missing(output))
    wanted, begin, failed = reference(), time.monotonic(), 0
    for number, case in enumerate(untried, 1):
        said = EQUAL
        try:
            assert_same(run_cases([case])[0], wanted, str(case))
        except Exception as error:
            said, failed = f"{type(error).__name__}: {error}".splitlines()[0], failed + 1
        with output.open("a") as file:
            print(json.dumps({"case": case, "said": said}), file=file)
        left = (time.monotonic() - begin) / number * (len(untried) - number) / 60
        named = ", ".join(f"{name} {choice}" for name, choice in zip(CHOICES, case, strict=True))
        print(f"{number} of {len(untried)}, {left:.0f} minutes left: {named}: {said}", flush=True)
    print(f"{len(every_case())} cases in {output}; {failed} of {len(untried)} now differ from one process")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
