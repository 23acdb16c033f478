"""Where in the data the steps of a run begin, from what it has left on the disk."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from metro_megatron.files import json_lines


def known_position(run: Path, step: int) -> tuple[int, int]:
    """(steps done, global position of the next sample) of the last log line or checkpoint up to `step`.

    (0, 0) if there is none.
    """
    return max((one for one in _positions(run) if one[0] <= step), default=(0, 0))


def _positions(run: Path) -> Iterator[tuple[int, int]]:
    for path in run.glob("iter_*/progress.json"):
        with suppress(ValueError, LookupError, TypeError):  # damaged: others tell
            figures = json.loads(path.read_bytes())
            yield int(figures["step"]), int(figures["consumed_samples"])
    # Lines of evaluations name no position.
    for line in json_lines(run / "metrics.jsonl", "step", "consumed_samples"):
        yield int(line["step"]), int(line["consumed_samples"])
