"""The storm draws what it says, its shim refuses the calls it is told to, and its journal counts what came."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from metro_megatron.errors import UserError
from tools.storm.faults import CALLS, MOST_CALLS, OF_FILES, TOGETHER, Shim, draw, flip_bit
from tools.storm.journal import Journal, counts, problems, report
from tools.storm.processes import signals_wait
from tools.storm.series import SERIES

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc is not there")


def test_faults_come_again_with_their_seed_and_all_kinds_equally_often() -> None:
    layouts = SERIES["other layouts"]
    faults = [draw(7, number, layouts, has_shim=True) for number in range(240)]
    assert faults == [draw(7, number, layouts, has_shim=True) for number in range(240)]
    assert faults != [draw(8, number, layouts, has_shim=True) for number in range(240)]
    kinds = Counter(fault.kind for fault in faults)
    assert len(kinds) == 12 and set(kinds.values()) == {20}
    assert {fault.layout for fault in faults} == set(layouts)
    assert not [fault for fault in faults if fault.kind in TOGETHER and fault.num_processes == 1]
    injections = [fault.injection for fault in faults if fault.kind in OF_FILES]
    assert all(one and 1 <= one.number <= MOST_CALLS[one.call] for one in injections)
    assert {one.call for one in injections if one} == set(MOST_CALLS)
    assert not {draw(7, number, layouts, has_shim=False).kind for number in range(50)} & set(OF_FILES)


CALLING = """
import json, os, shutil, sys
from pathlib import Path
from tools.storm.faults import CALLS, Injection, Shim

folder, mark, error = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for n in range(5):
    (folder / f"tree{n}").mkdir(parents=True)
    (folder / f"tree{n}" / "leaf").touch()

def attempt(action, n):
    try:
        action(n)
        return 0
    except OSError as problem:
        return problem.errno

found = {}
with (folder / "there").open("ab", buffering=0) as file, open(mark + ".elsewhere", "wb", buffering=0) as other:
    actions = {
        "open": lambda n: (folder / f"new{n}").open("w").close(),
        "write": lambda n: (other.write(b"y"), file.write(b"y")),
        "fsync": lambda n: os.fsync(file.fileno()),
        "rename": lambda n: os.replace(folder / "there", folder / "there"),
        "mkdir": lambda n: os.mkdir(folder / f"folder{n}"),
        "unlink": lambda n: (folder / f"tree{n}" / "leaf").unlink() if n < 3 else shutil.rmtree(folder / f"tree{n}"),
    }
    for call in CALLS:
        Shim(folder, Path(mark)).arm(Injection(call, 2, 2, error))
        found[call] = [attempt(actions[call], n) for n in range(5)]
print(json.dumps(found))
"""


@needs_compiler
def test_the_shim_refuses_the_calls_that_it_is_told_to_and_no_others(tmp_path: Path, library: Path) -> None:
    env = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", CALLING]
    result = subprocess.run([*words, tmp_path / "a", tmp_path / "mark", "5"], env=env, capture_output=True, check=True)
    assert json.loads(result.stdout) == {call: [0, 5, 5, 0, 0] for call in CALLS}
    assert (tmp_path / "mark").read_text().startswith(str(tmp_path / "a"))
    killed = subprocess.run([*words, tmp_path / "b", tmp_path / "mark", "0"], env=env, check=False)
    assert killed.returncode == -9 and sorted((tmp_path / "b").glob("new*")) == [tmp_path / "b" / "new0"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    Shim.build(path)
    return path


def test_a_flipped_bit_is_one_bit_of_any_file(tmp_path: Path) -> None:
    before = {name: bytes(range(size)) for name, size in {"large": 200, "small": 3}.items()}
    found = set()
    for place in (0.0, 0.3, 0.6, 0.999):
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        path = flip_bit(tmp_path, place)
        found.add(path.name)
        after = {name: (tmp_path / name).read_bytes() for name in before}
        pairs = [pair for name in before for pair in zip(before[name], after[name], strict=True)]
        assert sum((one ^ other).bit_count() for one, other in pairs) == 1
    assert found == set(before)


def row(number: int, kind: str, series: str = "one layout", run: int = 1, **fields: Any) -> dict[str, Any]:
    usual = {"hit": True, "began": 0, "steps": [], "seconds": 2.0, "problems": [], "damaged": {}}
    return {"attempt": number, "kind": kind, "series": series, "run": run, **usual, **fields}


def test_a_signal_that_comes_while_a_process_is_forked_is_heard_afterwards() -> None:
    class Heard(Exception):
        pass

    def hear(number: int, _: object) -> None:
        raise Heard(number)

    before = signal.signal(signal.SIGTERM, hear)
    forked = False
    try:
        with pytest.raises(Heard, match="15"), signals_wait():
            signal.raise_signal(signal.SIGTERM)
            forked = True
        assert forked and signal.getsignal(signal.SIGTERM) is hear
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_journal_goes_on_after_a_line_that_was_cut_and_counts_what_came(tmp_path: Path) -> None:
    path, about = tmp_path / "journal.jsonl", {"seed": 1, "shim": True}
    journal = Journal(path, about)
    journal.add({"undisturbed": 4.0})
    journal.add(row(0, "kill tree", steps=[1, 2, 3, 4, 5]))
    journal.add(row(3, "kill rank"))
    journal.add(row(1, "EIO", "other layouts", hit=False, steps=[1, 2], problems=["hangs: not over after 9 s"]))
    journal.add(row(2, "flipped bit", began=3, steps=[4, 5, 6], damaged={"file": "0a"}))
    assert journal.damaged("one layout") == {"file": "0a"} and journal.damaged("other layouts") == {}
    last = {"seconds": 1.0, "steps": [], "problems": ["corrupt load: iter_0000003"]}
    journal.add({"series": "one layout", "run": 1, **last})
    journal.add({"series": "one layout", "run": 1, "differences": []})
    journal.add({"series": "other layouts", "run": 1, "differences": ["ends early"]})
    with path.open("a") as file:
        file.write('{"attempt": 3, "kind"')
    again = Journal(path, about)
    assert again.rows == journal.rows and again.hits == 3 and again.undisturbed_seconds == 4.0
    assert again.damaged("one layout") == {}, "another run has begun"
    found = counts(again.attempts)
    assert {kind: (one.faults, one.late, one.lost) for kind, one in found.items()} == {
        "EIO": (0, 1, 0),
        "flipped bit": (1, 0, 2),
        "kill rank": (1, 0, 0),
        "kill tree": (1, 0, 0),
    }
    assert problems(again) == [
        "attempt 1: hangs: not over after 9 s",
        "last of one layout: corrupt load: iter_0000003",
        "other layouts, run 1: ends early",
    ]
    page = report(again, 6, ["a line"])
    assert "- one layout: 1 of 1 runs equal to the undisturbed one bit for bit\n" in page
    assert "- other layouts: 0 of 1 runs equal to the undisturbed one within 1e-6\n" in page
    assert "- 1 corrupt loads, 1 hangs, 0 other promises broken\n" in page
    assert "12 steps of use of 10 done" in page and "| flipped bit | 1 | 0 | 2 | 0 |" in page
    with pytest.raises(UserError, match="is of the storm"):
        Journal(path, {**about, "seed": 2})


@needs_compiler
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_24_faults_and_what_comes_out_is_equal(tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-m", "tools.storm.storm", "--faults", "24", "--output", tmp_path]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, env=env, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "- 0 corrupt loads, 0 hangs, 0 other promises broken" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert sum(row.get("hit", False) for row in rows) == 24
    again = subprocess.run(words, env=env, capture_output=True, text=True, cwd=ROOT, check=False)
    assert again.returncode == 0 and "[" not in again.stdout.partition("#")[0], "nothing is left to do"
