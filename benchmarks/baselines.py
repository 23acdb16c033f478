"""What others do with the same text, in one process: JSON Lines to a flat file of int32 ids.

Run as a module in a process of its own; prints a JSON object.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from metro_megatron.cli.command_line import run_tool

BATCH_DOCUMENTS = 256

Encode = Callable[[list[str]], list[list[int]]]


def sentencepiece_encoder(folder: Path) -> Encode:
    """SentencePiece as it comes."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return lambda texts: processor.encode(texts, num_threads=1)


def tokenizers_encoder(folder: Path) -> Encode:
    """The tokenizers library, in its fastest call, one thread."""
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


ENCODERS: dict[str, Callable[[Path], Encode]] = {
    "sentencepiece": sentencepiece_encoder,
    "tokenizers": tokenizers_encoder,
}


@dataclass(frozen=True)
class Options:
    """Who, what, and where to."""

    name: Literal["sentencepiece", "tokenizers"]
    """What encodes."""
    input: Path
    """JSON Lines."""
    tokenizer: Path
    """Tokenizer folder."""
    output: Path
    """File of ids to write."""


def main(options: Options) -> None:
    """Encode a file and print seconds, bytes and tokens as JSON."""
    print(json.dumps(encode_file(options.name, options.input, options.tokenizer, options.output)))


def encode_file(name: str, source: Path, folder: Path, output: Path) -> dict[str, float]:
    """Seconds without loading, bytes of text and tokens of one baseline."""
    encode = ENCODERS[name](folder)
    start, text_bytes, tokens = time.perf_counter(), 0, 0
    with output.open("wb") as file:
        for texts in _batches(source):
            text_bytes += sum(len(text.encode()) for text in texts)
            for ids in encode(texts):
                tokens += len(ids)
                file.write(np.asarray(ids, np.int32).data)
    return {"seconds": time.perf_counter() - start, "text_bytes": text_bytes, "tokens": tokens}


def _batches(source: Path) -> Iterator[list[str]]:
    with source.open("rb") as file:
        while lines := [line for _, line in zip(range(BATCH_DOCUMENTS), file, strict=False)]:
            yield [json.loads(line)["text"] for line in lines]


if __name__ == "__main__":
    run_tool(main)
