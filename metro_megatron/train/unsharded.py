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
from metro_megatron.model.encoder import MainModel
from metro_megatron.model.pair import Pair
from metro_megatron.parallel.layout import Layout


@torch.no_grad()
def trainer_outputs(
    iteration_folder: Path, config: Config, masked_tokens: Tensor, noised_tokens: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """Both models' outputs in fp32 at every position of padded rows.

    masked_tokens and noised_tokens [B, S] are the auxiliary's and main's inputs, lengths [B] the real tokens
    of each row. Returns mlm [B, S, V], hidden [B, S, H] (main's last layer), rtd [B, S] and clm [B, S, V];
    places behind a row's length mean nothing. Raises UserError for a damaged checkpoint.
    """
    single = replace(
        config,
        parallel=ParallelConfig(overlap=False),
        train=replace(config.train, precision="fp32", device="cpu"),
    )
    layout = Layout.create(single.parallel, torch.device("cpu"))
    try:
        pair = Pair.build(single, layout)
        load_weights(iteration_folder, pair, layout)
        for _, module in pair.modules():
            module.eval()
        batch = _every_position(masked_tokens, lengths)
        vocab_size = config.model.vocab_size
        rtd, clm = pair.main[0](noised_tokens, batch)
        return {
            "mlm": _rows(pair.auxiliary(batch).logits(), masked_tokens)[..., :vocab_size],
            "hidden": _hidden(pair.main[0], noised_tokens, batch),
            "rtd": rtd.t(),
            "clm": _rows(clm.logits(), masked_tokens)[..., :vocab_size],
        }
    finally:
        layout.destroy()


def _hidden(main: MainModel, tokens: Tensor, batch: MicroBatch) -> Tensor:
    return main.encode(tokens, batch).transpose(0, 1)


def _rows(logits: Tensor, tokens: Tensor) -> Tensor:
    """[M, V] for every position in [S, B] order, as [B, S, V]."""
    rows, length = tokens.shape
    return logits.view(length, rows, -1).transpose(0, 1)


def _every_position(tokens: Tensor, lengths: Tensor) -> MicroBatch:
    """A padded micro batch whose heads look at every position."""
    rows, length = tokens.shape
    places = torch.arange(length).expand(rows, length)
    return MicroBatch(
        tokens=tokens,
        masked_tokens=tokens,
        position_ids=places,
        is_real=places < lengths[:, None],
        masked_index=torch.arange(rows * length),
        noise_keys=torch.zeros(rows * length, 2, dtype=torch.int32),
        sample_lengths=lengths.int(),
        sample_ids=torch.arange(rows),
        is_packed=False,
        max_seqlen=int(lengths.max()),
    )
