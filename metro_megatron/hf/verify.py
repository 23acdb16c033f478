"""Whether an exported folder computes what the trainer's model computes.

Legend: B rows, S positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from metro_megatron.config.schema import ModelConfig
from metro_megatron.errors import UserError
from metro_megatron.hf.modeling_metro import MetroForPreTraining

MAX_DIFFERENCE = 1e-4
"""Largest absolute difference between outputs of order 1 in fp32; orders of addition alone give some 1e-6."""

MASK_PROBABILITY = 0.15


class Probe(NamedTuple):
    """Inputs of both models: masked and noised token ids [B, S], tokens in each row [B]."""

    masked_tokens: Tensor
    noised_tokens: Tensor
    lengths: Tensor


def random_probe(model_config: ModelConfig, seed: int = 1) -> Probe:
    """One row of all positions and one of a third of them, padded; random ids, masked ones replaced at random."""
    longest, special_ids = model_config.max_position_embeddings, model_config.special_ids
    num_words = special_ids.num_words(model_config.vocab_size)
    lengths = torch.tensor([longest, max(3, longest // 3)])
    generator = torch.Generator().manual_seed(seed)

    def random_ids() -> Tensor:
        return special_ids.word(torch.randint(num_words, (len(lengths), longest), generator=generator))

    position = torch.arange(longest)
    is_content = (position > 0) & (position < lengths[:, None] - 1)
    is_masked = is_content & (torch.rand(is_content.shape, generator=generator) < MASK_PROBABILITY)
    is_last = position == lengths[:, None] - 1
    specials = torch.where(position == 0, special_ids.bos, torch.where(is_last, special_ids.eos, special_ids.pad))
    tokens = torch.where(is_content, random_ids(), specials)
    return Probe(tokens.masked_fill(is_masked, special_ids.mask), torch.where(is_masked, random_ids(), tokens), lengths)


@torch.no_grad()
def hf_outputs(folder: Path, probe: Probe) -> dict[str, Tensor]:
    """hidden [B, S, H], and every `{name}_logits` as `name`, of the exported pair in fp32 on the CPU."""
    model = MetroForPreTraining.from_pretrained(folder, dtype=torch.float32).eval()
    is_real = (torch.arange(probe.masked_tokens.size(1)) < probe.lengths[:, None]).long()
    outputs = model(probe.masked_tokens, attention_mask=is_real, noised_input_ids=probe.noised_tokens)
    logits = {name.removesuffix("_logits"): one for name, one in outputs.items() if name.endswith("_logits")}
    return {"hidden": outputs.last_hidden_state, **logits}


@torch.no_grad()
def electra_outputs(folder: Path, probe: Probe) -> dict[str, Tensor]:
    """As `hf_outputs`, of what `write_electra_folders` wrote; rtd as ours says it, original above 0."""
    is_real = (torch.arange(probe.masked_tokens.size(1)) < probe.lengths[:, None]).long()
    outputs = {}
    if (folder / "generator").is_dir():
        generator = ElectraForMaskedLM.from_pretrained(folder / "generator", dtype=torch.float32).eval()
        outputs["mlm"] = generator(probe.masked_tokens, attention_mask=is_real).logits
    discriminator = ElectraForPreTraining.from_pretrained(folder / "discriminator", dtype=torch.float32).eval()
    said = discriminator(probe.noised_tokens, attention_mask=is_real, output_hidden_states=True)
    return {"hidden": said.hidden_states[-1], "rtd": -said.logits, **outputs}


def largest_differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], lengths: Tensor) -> dict[str, float]:
    """Largest absolute difference of every output over the real positions; NaN where either has one."""
    differences = {}
    assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
    for name, output in ours.items():
        is_real = torch.arange(output.size(1)) < lengths[:, None]
        differences[name] = float((output[is_real] - theirs[name][is_real]).abs().max())
    return differences


def refuse_differences(differences: Mapping[str, float]) -> None:
    """Raise UserError if any difference is above MAX_DIFFERENCE or not a number."""
    wrong = {name: value for name, value in differences.items() if not value <= MAX_DIFFERENCE}
    if wrong:
        figures = ", ".join(f"{name} by {value:.1e}" for name, value in wrong.items())
        raise UserError(
            f"the exported model differs from the trainer's: {figures}, allowed is {MAX_DIFFERENCE:.0e}; "
            "nothing was written. Please report this with the run_config.yaml"
        )
