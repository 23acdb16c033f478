"""One page that tells a stranger what was trained and what it learned; everything it shows is inside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from metro_megatron.files import replace_text

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>A small METRO-LM, pretrained here</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
figure, .example { margin: 1.5rem 0 }
img { max-width: 100% }
.example { border-left: 3px solid #bbb; padding-left: 1rem }
.example p { margin: .2rem 0 }
.name { display: inline-block; width: 6rem; color: #777 }
</style>
</head>
<body>
<h1>A small METRO-LM, pretrained here</h1>
<p>Two models read film reviews. The small <i>auxiliary</i> one fills hidden words with words that might stand there.
The <i>main</i> one reads the filled text and says of every word whether it is the author's, and what stood there if
not. $amount</p>
<h2>What it learned</h2>
<p>On reviews it has not seen. The third column is what the best guess without reading would have: words by their
frequency, or always saying how many are replaced. Losses are in nats, less is better; accuracies are shares.</p>
$figures
<h2>What that is good for</h2>
<p>$about</p>
$tasks
$verdicts
<h2>Sentences it has not seen</h2>
<p>$legend.</p>
$examples
<h2>How it went</h2>
<figure><img alt="Losses and rates over the steps of pretraining." src="data:image/png;base64,$curves"></figure>
</body>
</html>
""")


def write_page(path: Path, summary: Mapping[str, Any], examples: Mapping[str, Any], curves: Path) -> None:
    """Write the page of a summary, tools/evaluate.py's examples and a PNG of curves."""
    content = _PAGE.substitute(
        amount=escape(
            f"That took {summary['seconds'] / 60:.1f} minutes in all: {summary['tokens_seen'] / 1e6:.2f} million "
            f"tokens in {summary['steps']:,} steps."
        ),
        figures=_table(("", "model", "without reading"), _intrinsic(summary)),
        about=escape(summary["about_tasks"]),
        tasks=_table(
            (
                "accuracy in %, median (seeds)",
                "pretrained",
                "random weights",
                "word counts (TF-IDF)",
                "always the same",
            ),
            _tasks(summary["tasks"]),
        ),
        verdicts="".join(
            f"<p>{escape(f'{name.capitalize()}: {text}')}</p>" for name, text in summary["verdicts"].items()
        ),
        legend=escape(examples["legend"]),
        examples="".join(map(_example, examples["sentences"])),
        curves=base64.b64encode(curves.read_bytes()).decode(),
    )
    replace_text(path, content)


def _intrinsic(s: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        ("Filling hidden words: loss", f"{s['aux_loss']:.2f}", f"{s['unigram_loss']:.2f}"),
        ("… the author's word is the first guess", f"{s['aux_accuracy']:.3f}", f"{s['unigram_accuracy']:.3f}"),
        ("Correcting replaced words: loss", f"{s['clm_loss']:.2f}", f"{s['unigram_loss']:.2f}"),
        ("… the author's word is the first guess", f"{s['clm_accuracy']:.3f}", f"{s['unigram_accuracy']:.3f}"),
        ("Detecting replaced words: loss", f"{s['rtd_loss']:.3f}", f"{s['rtd_trivial_loss']:.3f}"),
        ("… a replaced word looks stranger than another (AUC)", f"{s['rtd_auc']:.3f}", "0.500"),
    ]


def _tasks(tasks: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    for name, task in tasks.items():
        yield (
            name,
            _seeds(task["pretrained"]),
            _seeds(task["random_init"]),
            f"{100 * task['tfidf']:.1f}",
            f"{100 * task['chance']:.1f}",
        )


def _seeds(values: Sequence[float]) -> str:
    return f"{100 * median(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for name, *cells in rows:
        numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        lines.append(f"<tr><td>{escape(name)}</td>{numbers}</tr>")
    return "\n".join([*lines, "</table>"])


def _example(sentence: Mapping[str, Any]) -> str:
    states = [(name, sentence[name]) for name in ("original", "masked", "filled", "corrected") if sentence[name]]
    lines = [f'<p><span class="name">{name}</span>{escape(text)}</p>' for name, text in states]
    rows = [
        (
            mask["token"],
            ", ".join(f"{one['token']} {one['probability']:.1%}" for one in mask["guesses"]),
            f"{mask['probability']:.1%}",
            f"{mask['frequency']:.1%}",
            f"{mask['frequent']['token']} {mask['frequent']['probability']:.1%}",
        )
        for mask in sentence["masks"]
    ]
    head = ("hidden", "expected", "the hidden one", "… by frequency alone", "expected by frequency alone")
    return f'<div class="example">{"".join(lines)}{_table(head, rows) if rows else ""}</div>'
