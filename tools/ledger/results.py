"""What only runs can show: METRO Figures 1 to 4, Tables 6 to 8."""

from dataclasses import replace
from typing import Any

from metro_megatron.cli.options import flatten, with_values
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from tools.ledger.costs import gpu_hours
from tools.ledger.recipe import FINETUNING
from tools.ledger.rows import DIFFERS, NOT_RUN, ROOT, Row, Section, compared, load

PLUS_PLUS = ("base_pp", "large_pp", "xl", "xxl")
FIGURE_3_STEPS = 60000
MINIATURE = ROOT / "docs" / "pictures" / "figure3.json"
"""Written by make figure3."""
STABLE = "XXL of Table 6; PDR and multi-task learning, which tools/finetune.py does not have"


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
    files = {arm: f"figure3/{arm}.yaml" for arm in paper["figure_3"]}
    rows = []
    for arm, legend in paper["figure_3"].items():
        hours = gpu_hours(load("xl", files[arm]), steps=FIGURE_3_STEPS)
        rows.append(Row(legend, "a curve", f"`{files[arm]}` over `xl`", f"{NOT_RUN} at XL: {hours}, the corpora"))
    return Section("Figure 3: stability of XL", rows, "make figure3")


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
