"""What only runs can show: METRO Figures 1 to 4, Tables 6 to 8."""

import json
from dataclasses import replace
from typing import Any

from metro_megatron.cli.options import flatten, with_values
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from tools.ledger.costs import gpu_hours
from tools.ledger.recipe import FINETUNING
from tools.ledger.rows import DIFFERS, EQUAL, NOT_RUN, ROOT, Row, Section, compared, load

PLUS_PLUS = ("base_pp", "large_pp", "xl", "xxl")
FIGURE_3_STEPS = 60000
MINIATURE = ROOT / "docs" / "pictures" / "figure3.json"
"""Written by make figure3."""
UNLIKE_XL = "width 32, 400 steps, and a made-up language; clipping binds in almost every step (docs/results.md)"
STABLE = "XXL of Table 6; then --pdr symkl and mnli_plus of tools/finetune.py"


def growth(paper: dict[str, Any]) -> Section:
    needs = f"{NOT_RUN}: {gpu_hours(*map(load, PLUS_PLUS))}, the corpora of Table 12, the test server"
    return Section("Figure 1: size and MNLI", [Row("METRO-LM", paper["figure_1"], "-", needs)])


def denoising(paper: dict[str, Any]) -> Section:
    """An illustration: both of its ways of training are configurations without problems."""
    rows = []
    for name, wanted in paper["figure_2"].items():
        base = load("base")
        config: Config = with_values(Config, flatten(base) | wanted)
        row = compared(name, wanted, config, "an illustration")
        found = problems(config, 1)
        rows.append(replace(row, verdict=f"{DIFFERS}: {'; '.join(found)}") if found else row)
    return Section("Figure 2: denoising", rows)


def stability(paper: dict[str, Any]) -> Section:
    rows = []
    for arm, legend in paper["figure_3"].items():
        file = f"figure3/{arm}.yaml"
        hours = gpu_hours(load("xl", file), steps=FIGURE_3_STEPS)
        needs = f"{NOT_RUN} at XL: {hours}, the corpora of Table 12"
        rows.append(Row(legend, "a curve", f"`{file}` over `xl`", needs))
    note = (
        "Below the arms at XL what the paper's text says of them, in a miniature with one seed, in the order of the "
        "arms; docs/results.md shows its curves."
    )
    return Section("Figure 3: stability of XL", [*rows, *_miniature()], "make figure3", note)


def _miniature() -> list[Row]:
    """What METRO section 4.3 says, checked on the curves of four small runs."""
    if not MINIATURE.is_file():
        return [Row("Miniature", "4.3", "-", f"{NOT_RUN}: two cores for some minutes")]
    curves = json.loads(MINIATURE.read_text(encoding="utf-8"))
    rates = {arm: points["replace_rate"] for arm, points in curves.items()}
    found = {arm: points["replace_accuracy"][-1] for arm, points in curves.items()}
    *others, scaled = curves
    falls = ", ".join(f"{rate[0]:.3f} to {rate[-1]:.3f}" for rate in rates.values())
    rises = ", ".join(f"{rate[-1] - min(rate):+.3f}" for rate in rates.values())
    ends = ", ".join(f"{value:.3f}" for value in found.values())
    claims = [
        ("all begin near 15% replaced, and fewer are later", falls, all(rate[-1] < rate[0] for rate in rates.values())),
        ("LR 1e-4 + GNormClip 2.0 diverges: its replace rate rises again", rises, _rises(rates[others[0]])),
        ("a lower rate and stronger clipping do not", rises, not any(_rises(rates[arm]) for arm in others[1:])),
        (
            "scaled initialization finds most of what was replaced",
            ends,
            found[scaled] > max(found[one] for one in others),
        ),
    ]
    verdicts = [EQUAL if holds else f"{DIFFERS}: {UNLIKE_XL}" for _, _, holds in claims]
    return [
        Row(f"Miniature: {claim}", "4.3", ours, verdict)
        for (claim, ours, _), verdict in zip(claims, verdicts, strict=True)
    ]


def _rises(rate: list[float]) -> bool:
    """By a tenth of what it fell, or more, from its lowest point to the end."""
    return rate[-1] - min(rate) > 0.1 * (rate[0] - min(rate))


def dev_results(paper: dict[str, Any]) -> Section:
    rows = []
    for size, said in paper["table_6"].items():
        needs = f"{NOT_RUN}: {gpu_hours(load(said['preset']))}"
        rows.append(Row(size, said["paper"], f"`{said['preset']}`", needs))
    note = f"MNLI-m/mm, average of GLUE, SQuAD 2.0 EM/F1. All need the corpora of Table 12, too, {FINETUNING}."
    return Section("Table 6: GLUE and SQuAD 2.0, development sets", rows, "tools/finetune.py", note)


def test_results(paper: dict[str, Any]) -> list[Section]:
    sections = []
    for table, benchmark in (("table_7", "GLUE"), ("table_8", "SuperGLUE")):
        said = paper[table]
        rows = [Row(f"XXL, {split}", said[split], "-", f"{NOT_RUN}: {STABLE}") for split in said]
        sections.append(Section(f"Table {table[-1]}: {benchmark} with stable fine-tuning", rows, "tools/finetune.py"))
    return sections


def stable_finetuning(paper: dict[str, Any]) -> Section:
    needs = f"{NOT_RUN}: {STABLE}"
    return Section("Figure 4: PDR and data augmentation", [Row("XXL on MNLI", paper["figure_4"], "-", needs)])
