"""The model card of an exported folder."""

from collections.abc import Mapping

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

A text encoder pretrained with METRO-LM (model-generated corruption): an auxiliary masked language model replaces
tokens, and the main model detects the replaced ones and predicts the originals. It is meant to be fine-tuned; the
main model has {main.num_layers} layers of width {main.hidden_size}, the auxiliary model {auxiliary.num_layers} of
width {auxiliary.hidden_size}.

## Use

`trust_remote_code=True` runs `modeling_metro.py` of this folder, which imports torch and transformers only.

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True, num_labels=2)
inputs = tokenizer(["a text"], ["its pair, or leave this out"], truncation=True, padding=True, return_tensors="pt")
logits = model(**inputs).logits
```

| class | weights |
|---|---|
| AutoModel | main encoder |
| AutoModelForSequenceClassification, ...TokenClassification, ...QuestionAnswering | main encoder, fresh head |
| AutoModelForMaskedLM | main encoder, corrective head |
| AutoModelForPreTraining | auxiliary and main encoder, all heads |

The corrective head gives the original token at every place of a text in which some tokens were replaced; it has never
seen `<mask>`. `MetroForAuxiliaryMaskedLM` in `modeling_metro.py` fills `<mask>`, and `MetroForReplacedTokenDetection`
says how probable it is that a token is the original.

Texts of at most {max_position_embeddings} tokens, `<s>` and `</s>` included; padding on the right.

## Facts

| | |
|---|---|
"""


def model_card(model_config: ModelConfig, facts: Mapping[str, object]) -> str:
    """README.md: what it is, how to load it, and `facts` as a table."""
    text = TEXT.format(
        main=model_config.main,
        auxiliary=model_config.auxiliary,
        max_position_embeddings=model_config.max_position_embeddings,
    )
    rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in facts.items())
    return HEADER + text + rows


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
