"""The model card of an exported folder."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from metro_megatron.config.schema import ModelConfig
from metro_megatron.files import replace_text

HEADER = """---
# license: yours to choose; what the texts of the table "Data" allow is part of it
library_name: transformers
pipeline_tag: feature-extraction
tags:
- metro-lm
- electra
- pretraining
"""
CARD = "README.md"
PRETRAINING = "pretraining"
"""The section of a run's step, tokens and flops, which stands in the header, too, for programs."""
EVALUATION = "evaluation"

TEXT = """
# METRO-LM encoder

A text encoder {origin}. It is meant to be
fine-tuned; the main model has {main.num_layers} layers of width {main.hidden_size}{pair}.

## Use

With the package metro_megatron installed, transformers knows the classes:

```python
import metro_megatron
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=2)
inputs = tokenizer(["a text"], ["its pair, or leave this out"], truncation=True, padding=True, return_tensors="pt")
logits = model(**inputs).logits
```

Without it, `trust_remote_code=True` runs the `*_metro.py` of this folder, which import torch and transformers (5 or
later) only:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True, num_labels=2)
```

| class | weights |
|---|---|
| AutoModel | main encoder |
| AutoModelForSequenceClassification, ...TokenClassification | main encoder, fresh head |
| AutoModelForMultipleChoice, ...QuestionAnswering | main encoder, fresh head |
{classes}
{notes}
What no Auto class stands for is loaded by its name, `metro_megatron.hf.modeling_metro.NAME.from_pretrained(FOLDER)`, or
without the package

```python
from transformers.dynamic_module_utils import get_class_from_dynamic_module

model = get_class_from_dynamic_module("modeling_metro.NAME", FOLDER).from_pretrained(FOLDER)
```

Texts of at most {max_position_embeddings} tokens, `<s>` and `</s>` included; padding on either side. Several texts in
one row: `position_ids` that begin at 0 with each.

## Facts

| | |
|---|---|
| objectives of the main model | {objectives} |
"""

LEARNED = {
    "rtd": "detects the replaced ones",
    "clm": "predicts the originals",
    "cloze": "picks the originals among three candidates",
    "scl": "recognizes a crop of the same text",
}
"""What the main model did with replaced tokens, by objective."""
CLASSES = {
    "clm": "| AutoModelForMaskedLM | main encoder, corrective head |",
    "mlm": "| AutoModelForMaskedLM | main encoder, masked language modeling head |",
}
NOTES = {
    "auxiliary": "`MetroForAuxiliaryMaskedLM` is the auxiliary model: it fills `<mask>`.",
    "rtd": "`MetroForReplacedTokenDetection` says how probable it is that a token is the original.",
    "clm": "The corrective head gives the original token at every place of a text in which some tokens were replaced;\n"
    "it has never seen `<mask>`.",
    "cloze": "`cloze_logits` of `AutoModelForPreTraining` score tokens against each other; they are no probabilities\n"
    "over the vocabulary.",
    "mlm": "`AutoModelForMaskedLM` fills `<mask>`.",
}


def model_card(model_config: ModelConfig, facts: Mapping[str, object], objectives: Collection[str]) -> str:
    """README.md: what it is, how to load it, and `facts` as a table.

    A fact that is a mapping, or a list of mappings with the same keys, becomes a section and table of its own.
    """
    layers = model_config.auxiliary_num_layers
    parts = [*(["auxiliary"] if layers else []), *objectives]
    everything = "auxiliary and main encoder, all heads" if layers else "main encoder, all heads"
    classes = [CLASSES[name] for name in parts if name in CLASSES]
    text = TEXT.format(
        origin=_origin(objectives),
        main=model_config.main,
        pair=f", the auxiliary model {layers} of width {model_config.auxiliary.hidden_size}" if layers else "",
        classes="\n".join([*classes, f"| AutoModelForPreTraining | {everything} |"]),
        notes="".join(f"\n{NOTES[name]}\n" for name in parts if name in NOTES),
        max_position_embeddings=model_config.max_position_embeddings,
        objectives=", ".join(objectives),
    )
    header = HEADER
    if facts.get(PRETRAINING):
        header += yaml.safe_dump({PRETRAINING: facts[PRETRAINING]}, sort_keys=False)
    return f"{header}---\n{text}{fact_tables(facts)}"


def fact_tables(facts: Mapping[str, object]) -> str:
    """Rows of a table of names and values, and behind it a section for every fact that is a table itself."""
    tables = {name: value for name, value in facts.items() if isinstance(value, Mapping | list)}
    rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in facts.items() if name not in tables)
    return rows + "".join(section(name, value) for name, value in tables.items() if value)


def section(title: str, content: Mapping[str, object] | Sequence[Mapping[str, object]]) -> str:
    """A heading and a table: of names and values, or of columns that are the keys of all mappings."""
    if isinstance(content, Mapping):
        header, rows = ["", ""], [[name, value] for name, value in content.items()]
    else:
        header, rows = list(content[0]), [list(one.values()) for one in content]
    lines: list[list[object]] = [[*header], ["---"] * len(header), *rows]
    table = "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)
    return f"\n## {title[:1].upper()}{title[1:]}\n\n{table}"


def add_evaluation(folder: Path, figures: Mapping[str, object]) -> bool:
    """Write figures into the card of a folder, in place of earlier ones; False where it has none to write."""
    path = folder / CARD
    if not (path.is_file() and os.access(folder, os.W_OK)):
        return False
    new = section(EVALUATION, figures)
    before, found, after = path.read_text(encoding="utf-8").partition(new[: new.index("\n\n", 1)])
    rest = after.partition("\n## ")[2]
    replace_text(path, before + new + (f"\n## {rest}" if rest else ""))
    return True


def pretraining_flops(folder: Path) -> float | None:
    """Model FLOPs of the run that a folder's card tells of; None where there is none that says it."""
    path = folder / CARD
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        header: Any = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
        return float(header[PRETRAINING]["flops"])
    except (yaml.YAMLError, IndexError, KeyError, TypeError, ValueError):
        return None


def _origin(objectives: Collection[str]) -> str:
    if "mlm" in objectives:
        return "pretrained as a masked language model with the code of METRO-LM"
    learned = " and ".join(LEARNED[name] for name in objectives)
    return (
        "pretrained with METRO-LM (model-generated corruption): tokens are replaced, by an auxiliary masked language "
        f"model where there is one, and the main model {learned}"
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")
