"""docs/reliability.md promises what tests hold: each of them is there, and what came of it is counted, not written."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from tools.storm.promises import PAGE, ROOT, Promise, noted, promises, read_cases


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_tests_that_are_there_and_what_came_of_them() -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = promises(text)
    tables = re.findall(r"^\| Promise \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(found) == len(rows) >= 25, "a row is | promise | `tests/...py::test_...` | what came of it |"
    named = [test for promise in found for test in promise.tests]
    assert [test for test in named if test.partition("::")[2] not in functions(ROOT / test.partition("::")[0])] == []
    wrong = [one.text for one in found if not re.fullmatch(r"not run|(\d+) of \1, \d{4}-\d\d-\d\d", one.passed)]
    assert wrong == [], "python -m tools.storm.promises writes the last column"


def test_cases_are_counted_and_noted_beside_their_promises(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_small.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\ndef test_two(n): assert n\n"
        "def test_wrong(): assert False\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir=.", "--junitxml=results.xml", "tests"]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, check=False)
    cases = read_cases(tmp_path / "results.xml")
    two, wrong, skipped = (f"tests/test_small.py::test_{name}" for name in ("two", "wrong", "skipped"))
    assert cases == {two: [True, True], wrong: [False], skipped: [False]}
    page = f"# Page\n\n| Held | `{two}` | not run |\n| Not | `{two}`, `{wrong}` | 3 of 3, 2025-01-01 |\n"
    written = noted(page, cases, "2026-01-02")
    assert promises(written) == [
        Promise("Held", [two], "2 of 2, 2026-01-02"),
        Promise("Not", [two, wrong], "2 of 3, 2026-01-02"),
    ]
