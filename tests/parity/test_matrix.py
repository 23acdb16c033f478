"""Pairs of choices of how a run is spread, in as few cases as show all of them; `make parity` has every case."""

from itertools import combinations

import pytest

from metro_megatron.config.problems import problems
from tests.parity import matrix
from tests.parity.matrix import CHOICES, every_case, pairs, world_size
from tests.parity.small_run import Record
from tests.parity.test_layouts import assert_same


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


@pytest.mark.parametrize("size", [1, 2, *(pytest.param(size, marks=pytest.mark.long) for size in (4, 8, 16))])
def test_every_pair_of_choices_equals_one_process(reference: Record, size: int) -> None:
    """Losses, norms, metrics and weights of six steps, with dropout."""
    cases = [case for case in pairs() if world_size(case) == size]
    for case, record in zip(cases, matrix.run_cases(cases), strict=True):
        assert_same(record, reference, str(case))
