"""docs/ledger.md: every table and figure of METRO, every claim of two abstracts, and what can be said of it here."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from metro_megatron.cli.command_line import run_tool
from tools.ledger import claims, costs, recipe, results
from tools.ledger.paper import read_paper
from tools.ledger.rows import DIFFERS, EQUAL, NOT_RUN, ROOT, Section

HEAD = f"""# Ledger

What METRO (arXiv 2204.06644) says in its tables and figures, and Fast-ELECTRA and the early-exit paper in their
abstracts, beside what this repository computes. `make ledger` writes this page; the papers' numbers stand in
`tools/ledger/paper.yaml`. A verdict is *{EQUAL}* (to the digits that the paper prints), *{DIFFERS}*, or *{NOT_RUN}*
with what it would need. GPU hours are model FLOPs of full samples on an A100 at {costs.EFFICIENCY:.0%} of its
{costs.GPUS[costs.GPU].tflops:,.0f} TFLOP/s: assumed, not measured.
"""


WIDTH = 120


@dataclass(frozen=True)
class Options:
    """Where to."""

    output: str = str(ROOT / "docs" / "ledger.md")
    """Page to write."""


def main(options: Options) -> None:
    """Write every table and figure of METRO, and every claim of two abstracts, with a verdict."""
    found = sections()
    Path(options.output).write_text(page(found), encoding="utf-8")
    print(f"{options.output}: {_total(found)}")


def sections() -> list[Section]:
    """In the order of the papers."""
    paper = read_paper()
    return [
        recipe.techniques(paper),
        recipe.ablations(paper),
        costs.parameters(paper),
        costs.memory(paper),
        costs.kernels(paper),
        results.dev_results(paper),
        *results.test_results(paper),
        recipe.glue(paper),
        recipe.superglue(paper),
        recipe.finetuning(paper),
        recipe.corpora(paper),
        recipe.pretraining(paper),
        results.growth(paper),
        results.denoising(paper),
        results.stability(paper),
        results.stable_finetuning(paper),
        costs.scaling(paper),
        claims.fast_electra(paper),
        claims.early_exit(paper),
    ]


def page(found: list[Section]) -> str:
    """Markdown."""
    return "\n".join([HEAD, f"{_total(found)}.", *(line for section in found for line in _lines(section))]) + "\n"


def _lines(section: Section) -> Iterator[str]:
    yield from ("", f"## {section.title}", "")
    if section.note:
        yield from (*wrap(section.note, WIDTH), "")
    yield from ("| | paper | here | verdict |", "|---|---|---|---|")
    for row in section.rows:
        yield f"| {row.what} | {row.paper} | {row.ours} | {row.verdict} |"
    yield from ("", f"By `{section.command}`.")


def _total(found: list[Section]) -> str:
    counts = Counter(
        next(kind for kind in (EQUAL, DIFFERS, NOT_RUN) if row.verdict.startswith(kind))
        for section in found
        for row in section.rows
    )
    return ", ".join(f"{counts[kind]} {kind}" for kind in (EQUAL, DIFFERS, NOT_RUN))


if __name__ == "__main__":
    run_tool(main)
