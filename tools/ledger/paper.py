"""The papers' numbers, as paper.yaml holds them, and when one of ours is equal to a printed one."""

from pathlib import Path
from typing import Any

import yaml

_FILE = Path(__file__).with_name("paper.yaml")
_SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


def read_paper() -> dict[str, Any]:
    """By name of the table or figure."""
    return yaml.safe_load(_FILE.read_text(encoding="utf-8"))


def number(printed: object) -> float:
    """Of 1.95M, 5e-4 or 400M."""
    text = str(printed)
    return float(text[:-1]) * _SUFFIXES[text[-1]] if text[-1] in _SUFFIXES else float(text)


def rounding(printed: str) -> float:
    """Half a unit of the last digit that is not a trailing zero: 500,000 of 184M, 50,000,000 of 1.6B and of 300M."""
    digits = printed.rstrip("KMGB")
    whole, _, fraction = digits.partition(".")
    places = -len(fraction) if fraction else len(whole) - len(whole.rstrip("0"))
    return 10.0**places / 2 * _SUFFIXES.get(printed[len(digits) :], 1.0)


def is_equal(ours: float, printed: str) -> bool:
    """Whether ours, rounded as it is printed, is what is printed."""
    return abs(ours - number(printed)) <= rounding(printed)
