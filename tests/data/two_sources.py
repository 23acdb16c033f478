"""A small dataset of two sources."""

import json
from pathlib import Path

from metro_megatron.preprocess.merging import merge
from metro_megatron.preprocess.run import PlanOptions, PreprocessOptions, preprocess


def texts_of(reviews: list[list[str]]) -> dict[str, list[list[str]]]:
    """Documents of both sources, each as its lines: long ones, and ones of short lines."""
    return {
        "long": reviews[:300],
        "short": [[paragraph[:40].strip() for paragraph in review] for review in reviews[300:500]],
    }


def write_two_sources(folder: Path, reviews: list[list[str]], tokenizer_folder: Path) -> None:
    """Write datasets parts/long, parts/short, and d, both in several shards of which one holds documents of both."""
    texts = texts_of(reviews)
    for name, documents in texts.items():
        records = [json.dumps({"text": "\n".join(document)}) + "\n" for document in documents]
        (folder / f"{name}.jsonl").write_text("".join(records))
        source, prefix = f"{name}={folder / name}.jsonl", str(folder / "parts" / name)
        preprocess(PreprocessOptions([source], str(tokenizer_folder), prefix, PlanOptions()))
    merge([str(folder / "parts" / name) for name in texts], str(folder / "d"), 70_000)
