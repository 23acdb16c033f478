"""The model card of an exported folder."""

from collections.abc import Collection, Mapping

from metro_megatron.config.schema import ModelConfig

HEADER = """---
library_name: transformers
pipeline_tag: feature-extraction
tags:
- metro-lm
- electra
- pretraining
---
"""

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
    """README.md: what it is, how to load it, and `facts` as a table."""
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
    rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in facts.items())
    return HEADER + text + rows


def _origin(objectives: Collection[str]) -> str:
    if "mlm" in objectives:
        return "pretrained as a masked language model with the code of METRO-LM"
    learned = " and ".join(LEARNED[name] for name in objectives)
    return (
        "pretrained with METRO-LM (model-generated corruption): tokens are replaced, by an auxiliary masked language "
        f"model where there is one, and the main model {learned}"
    )


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
