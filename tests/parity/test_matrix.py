"""Pairs of choices of how a run is spread, in as few cases as show all of them; `make parity` has every case."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from metro_megatron.config.problems import problems
from tests.checkpoint.test_save import HALF, equal_tensors, pass_on, straight_run
from tests.distributed import run_ranks
from tests.parity import matrix
from tests.parity.matrix import CHOICES, every_case, pairs, world_size
from tests.parity.small_run import Record
from tests.parity.test_layouts import assert_same
from tests.parity.test_stages import into


@pytest.fixture(scope="module")
def reference() -> Record:
    return matrix.reference()


def test_every_pair_is_there() -> None:
    """By hand: tp 4 with pp 4, interleaved stages with positions split, uneven ones with the GELU made again."""
    chosen = [dict(zip(CHOICES, case, strict=True)) for case in pairs()]
    for wanted in (
        {"tp": 4, "pp": 4},
        {"vpp": 2, "sequence_parallel": True},
        {"stages": "first heavy", "recompute": "selective"},
    ):
        assert any(wanted.items() <= case.items() for case in chosen), wanted
    for one, other in combinations(range(len(CHOICES)), 2):
        assert {(case[one], case[other]) for case in every_case()} == {(case[one], case[other]) for case in pairs()}


def test_every_case_can_run() -> None:
    """Of its problems only the folder is left, which these runs have not."""
    for case in every_case():
        assert all("train.output" in found for found in problems(matrix.config_of(case), world_size(case))), case


def test_what_is_not_known_as_equal_is_tried_again(tmp_path: Path) -> None:
    equal, failed, *others = every_case()
    lines = [{"case": equal, "said": matrix.EQUAL}, {"case": failed, "said": "TimeoutError: over 600 s"}]
    (tmp_path / "tried.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert sorted(map(str, matrix.missing(tmp_path / "tried.jsonl"))) == sorted(map(str, [failed, *others]))


@pytest.mark.parametrize("size", [1, 2, *(pytest.param(size, marks=pytest.mark.long) for size in (4, 8, 16))])
def test_every_pair_of_choices_equals_one_process(reference: Record, size: int) -> None:
    """Losses, norms, metrics and weights of three steps, with dropout."""
    cases = [case for case in pairs() if world_size(case) == size]
    for case, record in zip(cases, matrix.run_cases(cases), strict=True):
        assert_same(record, reference, str(case))


@pytest.mark.long
def test_a_checkpoint_goes_round_bit_by_bit(tmp_path: Path) -> None:
    """From layout to layout of 2 and 4 ranks, no two of which cut the model alike: weights, masters and moments."""
    cases = [case for case in pairs() if world_size(case) in (2, 4) and "none" in case]
    folders = [tmp_path / f"{number}" for number in range(len(cases) + 1)]
    for folder in folders:
        folder.mkdir()
    run_ranks(straight_run, 1, into(folders[0], matrix.alone()))
    for case, folder, copy in zip(cases, folders, folders[1:], strict=False):
        run_ranks(pass_on, world_size(case), into(folder, matrix.config_of(case)), copy)
    names, different = run_ranks(equal_tensors, 1, *(one / f"iter_{HALF:07d}" for one in (folders[0], folders[-1])))[0]
    assert not different and any("exp_avg_sq" in name for name in names) and len(cases) > 4
