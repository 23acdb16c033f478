"""Where in the data the steps of a run begin, from what it has left on the disk."""

import json
from collections.abc import Iterator
from pathlib import Path


def known_position(run: Path, step: int) -> tuple[int, int]:
    """(steps done, global position of the next sample) of the last log line or checkpoint up to `step`.

    (0, 0) if there is none.
    """
    return max((one for one in _positions(run) if one[0] <= step), default=(0, 0))


def _positions(run: Path) -> Iterator[tuple[int, int]]:
    for path in run.glob("iter_*/progress.json"):
        yield _position(path.read_text(encoding="utf-8"))
    log = run / "metrics.jsonl"
    if not log.is_file():
        return
    with log.open(encoding="utf-8") as file:
        for line in file:
            # A line without an end was cut short while the run goes on; those of evaluations name no position.
            if line.endswith("\n") and '"consumed_samples"' in line:
                yield _position(line)


def _position(text: str) -> tuple[int, int]:
    figures = json.loads(text)
    return int(figures["step"]), int(figures["consumed_samples"])
