"""Datasets of token ids looked at: statistics and pictures, documents and steps as text, every byte verified."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from metro_megatron.command_line import run_tool
from metro_megatron.config import Config, ParallelConfig
from metro_megatron.config_file import parse_config
from metro_megatron.config_problems import problems as config_problems
from metro_megatron.data.assembly import Statistics
from metro_megatron.data.index_cache import sample_indices
from metro_megatron.data.inspection import TextView, describe_document
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.progress import ReadingProgress
from metro_megatron.data.shards import Shard, open_shards
from metro_megatron.data.step_inspection import describe_step, first_position, logged_positions
from metro_megatron.data.verification import dataset_bytes
from metro_megatron.data.verification import verify as verify_dataset
from metro_megatron.data.waste import PACKED_ROW, Waste, measure_waste
from metro_megatron.errors import UserError


def main(
    prefix: list[str] = [],  # noqa: B006 - read only; the command line shows it
    config: list[str] = [],  # noqa: B006
    documents: list[int] = [],  # noqa: B006
    step: int = -1,
    samples: int = 5,
    verify: bool = False,
    picture: str = "",
) -> None:
    """Show what datasets hold. Without --documents, --step or --verify: counts, lengths and what padding would cost.

    Text is exact, but for control characters, shown as escapes; masked text stands in \u27e6 \u27e7. Exit codes: 0 done
    and sound, 2 refused or, with --verify, not sound, with all problems, 130 Ctrl-C.

    Args:
        prefix: Prefixes of datasets; default: data.train of the configuration.
        config: YAML files of a run, such as its run_config.yaml; default: the default configuration.
        documents: Print these documents, numbered from 0 over all datasets, a line for each unit.
        step: Print what this step of the run trains on; 0 is the first.
        samples: Number of samples printed of the step.
        verify: Read everything and compare it with the manifests.
        picture: Draw lengths and padding of every source into this file: .png, .svg or .pdf.
    """
    run = parse_config(["--config", *config]) if config else Config()
    prefixes = [name.removesuffix(".manifest.json") for name in prefix] or run.data.train
    if not prefixes:
        raise UserError("no dataset given; name one with --prefix, or a run's YAML file with --config")
    run = replace(run, data=replace(run.data, train=prefixes))
    if verify:
        _verify([*prefixes, *([] if prefix else run.data.validation)])
    shards = open_shards(prefixes)
    if documents:
        view = TextView(shards[0].tokenizer_path)
        print(*(describe_document(shards, number, view) for number in documents), sep="\n\n")
    if step >= 0:
        _print_step(run, shards, step, samples, Path(config[-1]).parent if config else Path())
    if picture or not (documents or step >= 0 or verify):
        _print_statistics(shards, picture)


def _verify(prefixes: Sequence[str]) -> None:
    found: list[str] = []
    total, done = 0, 0
    for prefix in prefixes:
        try:
            total += dataset_bytes(prefix)
        except UserError as error:
            found += error.problems
    if found:
        raise UserError(found)
    with ReadingProgress("verifying", total) as progress:

        def show(count: int) -> None:
            nonlocal done
            done += count
            progress.update(done, done)

        for prefix in prefixes:
            try:
                verify_dataset(prefix, show)
            except UserError as error:
                found += error.problems
    if found:
        raise UserError(found)
    print(f"sound: {', '.join(prefixes)}: {total / 1e6:,.1f} MB of shards are what their manifests say")


def _print_step(run: Config, shards: Sequence[Shard], step: int, samples: int, folder: Path) -> None:
    vocab_size, output = shards[0].vocab_size, run.train.output or "."
    run = replace(
        run,
        model=replace(run.model, vocab_size=vocab_size),
        train=replace(run.train, output=output),
        parallel=ParallelConfig(),
    )
    if found := config_problems(run, 1):
        raise UserError(found)
    index, _ = sample_indices(run.data, shards, [])
    data = PretrainingData(index, shards, run)
    known = logged_positions(folder / "metrics.jsonl")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("counting samples of earlier steps", total=step)
        first = first_position(data, run, step, known, lambda number: bar.update(task, completed=number + 1))
    batch = data.step_batch(step, first)
    print(
        f"step {step:,}: samples {first:,} to {batch.end - 1:,} of the run in {len(batch.micro_batches):,} "
        f"micro batches over all data-parallel ranks; {batch.num_tokens:,} tokens, {batch.num_masked:,} masked"
    )
    view = TextView(shards[0].tokenizer_path)
    for text in describe_step(batch, index, shards, view, samples):
        print(f"\n{text}")


def _print_statistics(shards: Sequence[Shard], picture: str) -> None:
    sources: dict[str, tuple[Statistics, Waste]] = {}
    datasets = {shard.dataset: [one for one in shards if one.dataset == shard.dataset] for shard in shards}
    for dataset, own in datasets.items():
        manifest = own[0].manifest
        size = sum(shard.tokens.nbytes for shard in own)
        print(f"{dataset}: {len(own):,} shards, {size / 1e6:,.1f} MB, {manifest['vocab_size']:,} ids")
        for entry, waste in zip(manifest["sources"], measure_waste(own), strict=True):
            statistics = Statistics.from_json(entry)
            print(f"  {entry['name']}")
            print(*(f"    {name:<28} {value}" for name, value in _rows(statistics, entry, waste)), sep="\n")
            if waste:
                name = entry["name"] if entry["name"] not in sources else f"{entry['name']} ({dataset})"
                sources[name] = (statistics, waste)
    if picture:
        _draw(sources, Path(picture))
    print(f"next:\n  python tools/inspect_data.py --prefix {' '.join(map(shlex.quote, datasets))} --step 0")


def _rows(statistics: Statistics, entry: dict, waste: Waste | None) -> list[tuple[str, str]]:
    rows = [("documents", f"{statistics.documents:,}")]
    rows += [(name, f"{getattr(statistics, name):,}") for name in ("units", "tokens")]
    for name, histogram, count in (
        ("tokens of a document", statistics.document_lengths, statistics.documents),
        ("tokens of a unit", statistics.unit_lengths, statistics.units),
    ):
        tenth, half, most = (histogram.quantile(share) for share in (0.1, 0.5, 0.9))
        mean = statistics.tokens / max(1, count)
        rows.append((name, f"mean {mean:,.1f}; 10%, 50%, 90% of them: about {tenth:,}, {half:,}, {most:,}"))
    if waste:
        for length in waste.padded:
            shares = f"{waste.padded[length]:.1%} padded, {waste.packed[length]:.2%} in packed rows of {PACKED_ROW:,}"
            rows.append((f"padding at {length} tokens", shares))
    for what in ("rejects", "dropped"):
        rows += [(f"{what}: {reason}", f"{count:,}") for reason, count in entry[what].items()]
    return rows


def _draw(sources: dict[str, tuple[Statistics, Waste]], output: Path) -> None:
    try:
        from metro_megatron.data.statistics_picture import SourceFigures, draw
    except ImportError as error:
        raise UserError(f"--picture needs {error.name}; install it with: pip install metro_megatron[demo]") from error
    figures = {
        name: SourceFigures(one.document_lengths, one.unit_lengths, waste) for name, (one, waste) in sources.items()
    }
    draw(figures, output)
    print(f"made {output}")


if __name__ == "__main__":
    run_tool(main)
