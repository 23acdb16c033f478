"""docs/ledger.md is what the command writes; printed numbers are compared to their digits."""

import re
from pathlib import Path

import pytest

from tools.ledger.ledger import page, sections
from tools.ledger.paper import is_equal, number, rounding

PAGE = Path(__file__).parents[2] / "docs" / "ledger.md"


def test_the_page_is_what_the_command_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(sections()), "run make ledger"


def test_every_table_and_figure_has_its_section() -> None:
    titles = re.findall(r"^## (Table|Figure) (\d+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(titles) == sorted(
        [*(("Table", str(one)) for one in range(1, 14)), *(("Figure", str(one)) for one in range(1, 6))]
    )


@pytest.mark.parametrize(
    ("printed", "value", "half_unit"),
    [("184M", 184e6, 5e5), ("1.6B", 1.6e9, 5e7), ("300M", 300e6, 5e7), ("1.95M", 1.95e6, 5e3), ("5e-4", 5e-4, None)],
)
def test_a_printed_number(printed: str, value: float, half_unit: float | None) -> None:
    assert number(printed) == pytest.approx(value, rel=1e-15)
    if half_unit:
        assert rounding(printed) == pytest.approx(half_unit, rel=1e-12)
        assert is_equal(value + 0.99 * half_unit, printed) and not is_equal(value + 1.01 * half_unit, printed)
