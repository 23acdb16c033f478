"""The trainer's own model in one process on the CPU: what exported models are compared with.

Legend: B rows, S positions, H hidden, V vocabulary, M positions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from metro_megatron.checkpoint.save import load_weights
from metro_megatron.config.schema import Config, ParallelConfig
from metro_megatron.data.batch import MicroBatch
from metro_megatron.data.views import View
from metro_megatron.model.heads import Decoding
from metro_megatron.parallel.layout import Layout
from metro_megatron.train.build import Parts


@torch.no_grad()
def trainer_outputs(
    iteration_folder: Path, config: Config, masked_tokens: Tensor, noised_tokens: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """Both models' outputs in fp32 at every position of padded rows.

    masked_tokens and noised_tokens [B, S] are the auxiliary's and main's inputs, lengths [B] the real tokens
    of each row. Returns hidden [B, S, H] (main's last layer) and what every head says, [B, S] or [B, S, V], by the name
    that its output has in the exported model (without `_logits`);
    positions behind a row's length mean nothing. Raises UserError for a damaged checkpoint.
    """
    single = replace(
        config,
        parallel=ParallelConfig(overlap=False),
        train=replace(config.train, precision="fp32", fp8_recipe="none", device="cpu"),
    )
    layout = Layout.create(single.parallel, torch.device("cpu"))
    try:
        parts = Parts.build(single, layout)
        load_weights(iteration_folder, parts.pair, layout)
        for _, module in parts.pair.modules():
            module.eval()
        micro_batch = _every_position(masked_tokens, lengths)
        reading = parts.pair.main[0](View(noised_tokens, micro_batch))
        terms = [term for term in parts.terms if term.exported and term.name in reading.heads]
        said = {term.exported: reading.heads[term.name] for term in terms}
        for term in parts.corruptor.terms:
            said[term.exported] = parts.corruptor.trained[term.name](micro_batch)
        outputs = {name: _rows(one, masked_tokens, config.model.vocab_size) for name, one in said.items()}
        return {"hidden": reading.hidden.transpose(0, 1), **outputs}
    finally:
        layout.destroy()


def _rows(said: Tensor | Decoding, tokens: Tensor, vocab_size: int) -> Tensor:
    """What a head says of every position, [S, B] or logits that are not computed yet, as [B, S] or [B, S, V]."""
    if isinstance(said, Tensor):
        return said.t()
    rows, length = tokens.shape
    return said.logits().view(length, rows, -1).transpose(0, 1)[..., :vocab_size]


def _every_position(tokens: Tensor, lengths: Tensor) -> MicroBatch:
    """A padded micro batch whose heads look at every position."""
    rows, length = tokens.shape
    positions = torch.arange(length).expand(rows, length)
    return MicroBatch(
        tokens=tokens,
        masked_tokens=tokens,
        position_ids=positions,
        is_real=positions < lengths[:, None],
        masked_index=torch.arange(rows * length),
        noise_keys=torch.zeros(rows * length, 2, dtype=torch.int32),
        sample_lengths=lengths.int(),
        sample_ids=torch.arange(rows),
        is_packed=False,
        max_seqlen=int(lengths.max()),
        num_samples=rows,
    )
