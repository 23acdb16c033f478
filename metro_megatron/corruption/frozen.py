"""Fast-ELECTRA's corruption: an existing masked language model fills the masks and learns nothing.

The model is one of transformers, which reads padded rows: samples are taken out of packed ones. Every rank runs it
whole, on its pipeline rank's share of the micro batches; tensor-parallel ranks take the draws of their first one.

Legend: n samples, L positions of the longest one, M masked positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from fused.linear_cross_entropy import Sampling, linear_cross_entropy
from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss, sampling_of
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.hf.modeling_metro import MetroForAuxiliaryMaskedLM
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.objective.vocabulary import vocabulary_shard
from metro_megatron.parallel.layout import Layout


class PaddedSamples(NamedTuple):
    """The samples of a micro batch, one a row."""

    tokens: Tensor
    """int64 [n, L] masked ids; padding behind a sample's end."""
    is_real: Tensor
    """bool [n, L]."""
    masked: tuple[Tensor, Tensor]
    """int64 [M] sample and position of each of masked_index."""

    @classmethod
    def of(cls, micro_batch: MicroBatch, pad_id: int) -> PaddedSamples:
        """Of a micro batch, packed or padded; rows without a sample are left out."""
        rows, length = micro_batch.tokens.shape
        lengths = micro_batch.sample_lengths.long()
        column, row = micro_batch.masked_index // rows, micro_batch.masked_index % rows
        if micro_batch.is_packed:
            begins = micro_batch.cu_seqlens.long()[:-1]
            sample = torch.searchsorted(begins, column, right=True) - 1
            position = column - begins[sample]
        else:
            begins = torch.arange(rows, device=lengths.device) * length
            sample, position = row, column
        number = (lengths > 0).cumsum(0) - 1
        begins, lengths = begins[micro_batch.sample_index], lengths[micro_batch.sample_index]
        offset = torch.arange(micro_batch.max_seqlen, device=lengths.device)
        is_real = offset < lengths[:, None]
        cells = (begins[:, None] + offset).clamp(max=rows * length - 1)
        tokens = micro_batch.masked_tokens.reshape(-1)[cells].masked_fill(~is_real, pad_id)
        return cls(tokens, is_real, (number[sample], position))


class OutputLayer(NamedTuple):
    """The linear layer behind a masked language model's head: logits = rows weight^T + bias."""

    weight: Tensor
    """[V or more, H]."""
    bias: Tensor | None

    @classmethod
    def taken_from(cls, model: PreTrainedModel) -> OutputLayer:
        """That of `model`, whose logits [..., V] become the rows [..., H] before it."""
        layer = model.get_output_embeddings()
        assert isinstance(layer, nn.Linear)
        (name,) = [name for name, module in model.named_modules() if module is layer]
        model.set_submodule(name, nn.Identity())
        return cls(layer.weight, layer.bias)


class Frozen(Corruptor):
    """No gradients, no gradient buffers, no optimizer state, no part of the checkpoint; main owns the token table.

    q(word) = softmax(logits / T), T falling over the run (Fast-ELECTRA). Its MLM loss is a figure, not a part of the
    whole loss. model: as train/frozen_model.py opens it; it is changed.
    """

    def __init__(self, config: Config, layout: Layout, model: PreTrainedModel):
        self.config = config
        self.term = MaskedLanguageModel(config)
        self.terms = (self.term,)
        self.group = layout.tensor
        self.model = model.requires_grad_(False).eval()
        self.model.to(device=layout.device, dtype=mcore.DTYPES[config.train.precision])  # type: ignore[arg-type]
        self.output_layer = OutputLayer.taken_from(self.model)
        self.masked: tuple[Tensor, Tensor] | None = None
        """Sample and position of what the head is asked of, while the model runs."""
        is_pair = isinstance(model, MetroForAuxiliaryMaskedLM)
        encoder = model.get_submodule("auxiliary") if is_pair else model.base_model
        encoder.register_forward_hook(self._keep_masked)

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        return self.fill(micro_batch, sampling_of(self.config, micro_batch, batch))

    @torch.no_grad()
    def fill(self, micro_batch: MicroBatch, sampling: Sampling) -> Proposal:
        """Replacements that are drawn so."""
        targets = micro_batch.masked_targets
        shard = vocabulary_shard(0, self.config.model)
        found = linear_cross_entropy(self._rows(micro_batch), *self.output_layer, targets, shard, sampling)
        assert found.sampled is not None
        if self.group.size() > 1:
            dist.broadcast(found.sampled, group=self.group, group_src=0)
        _, sums = self.term.summed(found, targets)
        return Proposal(found.sampled, sums, losses=found.loss)

    def _rows(self, micro_batch: MicroBatch) -> Tensor:
        """[M, H] before the output layer."""
        if not micro_batch.masked_index.numel():
            return self.output_layer.weight[:0]
        tokens, is_real, self.masked = PaddedSamples.of(micro_batch, self.config.model.pad_token_id)
        rows: Tensor = self.model(input_ids=tokens, attention_mask=is_real.long()).logits[0]
        self.masked = None
        return rows

    def _keep_masked(self, encoder: nn.Module, arguments: Any, output: BaseModelOutput) -> BaseModelOutput:
        """A forward hook: the head sees one row of the M hidden states it is asked of, instead of all of them."""
        assert self.masked is not None and output.last_hidden_state is not None
        output.last_hidden_state = output.last_hidden_state[self.masked][None]
        return output
