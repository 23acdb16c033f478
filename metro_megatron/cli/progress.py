"""Progress of a tool that reads files: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ReadingProgress:
    """Shows how far reading `total_bytes` of files has come, with `note`; a context. Writes to stderr."""

    def __init__(self, title: str, total_bytes: int):
        self._title = title
        self._total = max(1, total_bytes)
        self._start = self._last_line = time.monotonic()
        console = Console(stderr=True)
        columns = (
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._advanced = 0
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(TextColumn(title), *columns, console=console)
            self._task = self._bar.add_task(title, total=self._total, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, size: int) -> None:
        """`size` bytes more are read, all of which count."""
        self._advanced += size
        self.update(self._advanced, self._advanced)

    def update(self, position: int, text_bytes: int, tokens: int = 0, rejected: int = 0) -> None:
        """`position` of the total bytes are read; they held so much text, tokens and rejected records."""
        now = time.monotonic()
        seconds = max(1e-9, now - self._start)
        note = f"{text_bytes / 1e6 / seconds:.1f} MB/s"
        note += f", {tokens / 1e6 / seconds:.2f} M tokens/s" if tokens else ""
        note += f", {rejected:,} rejected" if rejected else ""
        if self._bar:
            self._bar.update(self._task, completed=position, note=note)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            share = position / self._total
            remaining = seconds * (1 - share) / max(share, 1e-9)
            note += f", about {remaining:,.0f} s left" if position else ""
            print(f"{self._title}: {share:.1%}, {note}", file=sys.stderr, flush=True)


class CountLines:
    """A line to stderr now and then, for work whose end is not known: `CountLines("{:,} samples found")`."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._last_line = time.monotonic()

    def show(self, count: int) -> None:
        """So many are done."""
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(self._text.format(count), file=sys.stderr, flush=True)
