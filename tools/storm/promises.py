"""Run the tests of docs/reliability.md's promises, and note beside each how many of their cases passed, and when."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError
from metro_megatron.files import replace_text

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
_ROW = re.compile(r"^\| (?P<promise>.+) \| (?P<tests>`tests/.+`) \| (?P<passed>[^|]*) \|$", re.MULTILINE)
Cases = Mapping[str, list[bool]]
"""Whether each case of a test passed, by the test's id."""


@dataclass(frozen=True)
class Options:
    """Which page."""

    page: str = str(PAGE)
    """Its tables are rewritten."""


@dataclass(frozen=True)
class Promise:
    """A row of a table."""

    text: str
    tests: list[str]
    """Ids, as pytest takes them."""
    passed: str


def main(options: Options) -> int:
    """Run the tests that docs/reliability.md names, and write into its tables what came of them.

    Ends with status 1 if a case failed or was skipped.
    """
    page = Path(options.page)
    named = sorted({test for promise in promises(page.read_text(encoding="utf-8")) for test in promise.tests})
    if not named:
        raise UserError(f"{page}: no table of promises in it")
    print(f"{len(named)} tests, about ten minutes on 2 cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", *named]
        subprocess.run(words, cwd=ROOT, check=False)
        cases = read_cases(results)
    today = datetime.now(UTC).date().isoformat()
    replace_text(page, noted(page.read_text(encoding="utf-8"), cases, today))
    failed = [test for test in named if not cases.get(test) or not all(cases[test])]
    print(*(f"not passed: {test}" for test in failed), f"{len(named) - len(failed)} tests passed: {page}", sep="\n")
    return int(bool(failed))


def promises(page: str) -> list[Promise]:
    """The rows of all tables of promises."""
    return [Promise(row["promise"], _ids(row["tests"]), row["passed"]) for row in _ROW.finditer(page)]


def noted(page: str, cases: Cases, day: str) -> str:
    """The page with what came of the tests in the last column."""

    def note(row: re.Match[str]) -> str:
        found = [passed for test in _ids(row["tests"]) for passed in cases.get(test, [])]
        return f"| {row['promise']} | {row['tests']} | {sum(found)} of {len(found)}, {day} |"

    return _ROW.sub(note, page)


def read_cases(results: Path) -> Cases:
    """What a run of pytest says in JUnit's format; a case that was skipped has not passed."""
    found: dict[str, list[bool]] = defaultdict(list)
    for case in ElementTree.parse(results).iter("testcase"):
        name = case.attrib["name"].partition("[")[0]
        test = f"{case.attrib['classname'].replace('.', '/')}.py::{name}"
        found[test].append(all(child.tag not in ("failure", "error", "skipped") for child in case))
    return found


def _ids(cell: str) -> list[str]:
    return re.findall(r"`(tests/[^`]+)`", cell)


if __name__ == "__main__":
    run_tool(main)
