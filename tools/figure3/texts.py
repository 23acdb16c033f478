"""A language so small that 48 layers of width 32 learn some of it in minutes: phrases that repeat themselves."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metro_megatron.cli.command_line import run_tool

WORDS = (
    *("king", "dog", "bird", "river", "house", "stone", "letter", "ship"),
    *("old", "small", "red", "cold", "happy", "sees", "likes", "finds"),
)
PHRASE_WORDS = (2, 4)
DOCUMENT_WORDS = 30


@dataclass(frozen=True)
class Options:
    """How much, and where to."""

    output: str
    """File to write, .jsonl."""
    documents: int = 20000
    """How many."""


def main(options: Options) -> None:
    """Write documents, each of which repeats a phrase of its own: a masked word follows from what stands around it."""
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}) + "\n" for text in documents(options.documents))
    output.write_text("".join(lines), encoding="utf-8")
    print(f"{output}: {options.documents:,} documents of {DOCUMENT_WORDS} words, {len(WORDS)} different ones")


def documents(count: int) -> Iterator[str]:
    """The same ones every time."""
    generator = random.Random(1)
    for _ in range(count):
        phrase = generator.sample(WORDS, generator.randint(*PHRASE_WORDS))
        first = generator.randrange(len(phrase))
        yield " ".join(phrase[(first + index) % len(phrase)] for index in range(DOCUMENT_WORDS))


if __name__ == "__main__":
    run_tool(main)
