"""Samples with the loss of every token, as text and as one page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from string import Template

import numpy as np
from numpy.typing import NDArray

from metro_megatron.tokenizer.tokenizer import Tokenizer

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 15px/2.1 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.sample { border-top: 1px solid #ddd; padding: .8rem 0 }
.place { color: #777; font-size: 85% }
.token { white-space: pre; border-radius: 3px; padding: 1px 0 }
.replaced { border-bottom: 3px solid #c33 }
.kept { border-bottom: 3px solid #393 }
.original { color: #777; font-size: 80%; vertical-align: super }
</style>
</head>
<body>
<h1>$title</h1>
$facts
<p>The darker a token, the larger the weighted sum of its losses; the pointer shows them one by one.
<span class="token replaced">Underlined in red</span> is what was replaced, with the original above it,
<span class="token kept">in green</span> a mask that got its original back.</p>
$samples
</body>
</html>
""")
_DARKEST = 0.75
"""Opacity of the token with the largest loss of the page."""


@dataclass(frozen=True)
class SampleLosses:
    """One sample of a step; n tokens, <s> and </s> included."""

    place: int
    """Its global position in the run's order."""
    originals: NDArray[np.int64]
    """[n]"""
    read: NDArray[np.int64]
    """[n] what main read."""
    is_masked: NDArray[np.bool_]
    """[n]"""
    losses: dict[str, NDArray[np.float64]]
    """[n] by loss, before its weight; NaN where a token adds nothing to it."""


class Words:
    """Ids as the text that they are behind other text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._space = tokenizer.encode(" ")[:1]

    def __getitem__(self, token: int) -> str:
        if token in self._tokenizer.special_ids.all:
            return self._tokenizer.token(token)
        return self._tokenizer.decode([*self._space, token])


def text_of(sample: SampleLosses, words: Words) -> Iterator[str]:
    """A line for the sample, then one for each of its masks: position, original, what main read, losses."""
    yield f"sample {sample.place:,}: {len(sample.read)} tokens, {_means(sample)}"
    for i in np.flatnonzero(sample.is_masked):
        losses = ", ".join(
            f"{name} {values[i]:.4f}" for name, values in sample.losses.items() if values[i] == values[i]
        )
        yield f"  {i:4d}  {words[int(sample.originals[i])]!r} -> {words[int(sample.read[i])]!r}  {losses}"


def page_of(
    samples: Sequence[SampleLosses], words: Words, weights: dict[str, float], title: str, facts: Sequence[str]
) -> str:
    """All samples as HTML, everything inside it; weights are the losses' in the whole one."""
    totals = [
        np.nansum([weights[name] * values for name, values in sample.losses.items()], axis=0) for sample in samples
    ]
    largest = max((float(total.max()) for total in totals), default=0.0) or 1.0
    parts = [
        f'<div class="sample"><div class="place">sample {sample.place:,}, {escape(_means(sample))}</div>'
        + "".join(_chip(sample, i, words, total[i] / largest) for i in range(len(sample.read)))
        + "</div>"
        for sample, total in zip(samples, totals, strict=True)
    ]
    lines = "".join(f"<p>{escape(fact)}</p>\n" for fact in facts)
    return _PAGE.substitute(title=escape(title), facts=lines, samples="\n".join(parts))


def _chip(sample: SampleLosses, i: int, words: Words, share: float) -> str:
    original, read = (int(ids[i]) for ids in (sample.originals, sample.read))
    said = [f"{name} {values[i]:.4f}" for name, values in sample.losses.items() if values[i] == values[i]]
    kind = " replaced" if original != read else " kept" if sample.is_masked[i] else ""
    above = f'<span class="original">{escape(words[original])}</span>' if original != read else ""
    style = f"background: rgba(230, 150, 30, {_DARKEST * share:.3f})"
    title = escape(f"position {i}, id {read}: {', '.join(said) or 'no loss'}", quote=True)
    return f'<span class="token{kind}" style="{style}" title="{title}">{escape(words[read])}{above}</span>'


def _means(sample: SampleLosses) -> str:
    present = {name: values[~np.isnan(values)] for name, values in sample.losses.items()}
    return ", ".join(f"{name} {values.mean():.4f}" for name, values in present.items() if len(values))
