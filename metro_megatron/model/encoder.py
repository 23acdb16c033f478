"""The auxiliary model, the main model's chunks, and the parameters both use.

Legend: S positions, B rows, H hidden, M masked positions, V vocabulary rows of this rank.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.data.batch import MicroBatch
from metro_megatron.model.heads import CLMHead, Decoding, MLMHead
from metro_megatron.model.layer import LOCAL, block_spec, linear
from metro_megatron.model.norm import LayerNorm, mark_sequence_parallel
from metro_megatron.model.position import Positions
from metro_megatron.model.sequences import EMBEDDING_SITE, Sequences, sequences_of
from metro_megatron.vocabulary import padded_vocab_size


class TiedParameters(MegatronModule):
    """What both phases of a step use: the token embedding and main's relative-position table."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: ProcessGroupCollection):
        super().__init__(config=config)
        self.word = VocabParallelEmbedding(
            padded_vocab_size(model.vocab_size),
            model.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=groups.tp,
        )
        self.main_table = Positions(config, model.position_scheme, groups.tp)


class Embedding(MegatronModule):
    """dropout(LN(E[token] + P[position])): the token embedding is borrowed, the rest is the encoder's own."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, tied: TiedParameters):
        super().__init__(config=config)
        self.borrowed = (tied,)  # in a tuple, so that it is not registered as a submodule
        self.position = torch.nn.utils.skip_init(
            torch.nn.Embedding, model.max_position_embeddings, model.hidden_size, device=torch.cuda.current_device()
        )
        mark_sequence_parallel(self.position, config)
        self.norm = LayerNorm(config, hidden_size=model.hidden_size, eps=model.layer_norm_eps)

    def forward(self, tokens: Tensor, position_ids: Tensor, sequences: Sequences) -> Tensor:
        """tokens and position_ids [B, S] to [S, B, H], or this rank's part of S under sequence parallelism."""
        words = self.borrowed[0].word(tokens)
        places = position_ids.t()
        if self.config.sequence_parallel:
            group = self.borrowed[0].word.tp_group
            places = places.chunk(group.size())[group.rank()]
        else:
            words = words.transpose(0, 1).contiguous()
        dropout = None
        if self.training and sequences.dropout is not None:
            dropout = sequences.dropout.of_rows(self.config.hidden_dropout, EMBEDDING_SITE, is_last=True)
        return self.norm(words, self.position(places), dropout=dropout)


class Encoder(MegatronModule):
    """Embedding and layers, or the part of them that one pipeline stage holds."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        tied: TiedParameters,
        positions: Positions,
        groups: ProcessGroupCollection,
        vp_stage: int | None = None,
    ):
        super().__init__(config=config)
        pp, rank = groups.pp.size(), groups.pp.rank()
        chunks = config.virtual_pipeline_model_parallel_size or 1
        self.pre_process = rank == 0 and not vp_stage
        self.post_process = rank == pp - 1 and (vp_stage or 0) == chunks - 1
        self.vp_stage = vp_stage
        self.borrowed = (tied,)
        self.tensor_group = groups.tp
        if self.pre_process:
            self.embedding = Embedding(config, model, tied)
        num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank)
        self.block = TransformerBlock(
            config,
            block_spec(LOCAL, num_layers, positions),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )

    @property
    def word(self) -> Tensor:
        """This rank's rows of the token embedding [V, H]."""
        return self.borrowed[0].word.weight

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """megatron-core's schedules hand over the previous stage's output here."""
        self.block.set_input_tensor(tensors[0])

    def encode(self, tokens: Tensor, batch: MicroBatch) -> Tensor:
        """Hidden states [S, B, H], whole on every tensor-parallel rank on the last stage.

        tokens [B, S] are the masked or the corrupted ids of batch.
        """
        sequence_group = self.tensor_group if self.config.sequence_parallel else None
        sequences = sequences_of(batch, self.config.num_layers, sequence_group)
        hidden = self.embedding(tokens, batch.position_ids, sequences) if self.pre_process else None
        hidden = self.block(hidden_states=hidden, attention_mask=None, packed_seq_params=sequences)
        if self.post_process and self.config.sequence_parallel:
            # What follows is the same on all tensor-parallel ranks: its gradient is split, not summed.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tensor_group
            )
        return hidden


class AuxiliaryModel(Encoder):
    """The shallow masked language model that proposes replacements."""

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, tied: TiedParameters, groups: ProcessGroupCollection
    ):
        positions = Positions(config, model.position_scheme, groups.tp)
        super().__init__(config, model, tied, positions, groups)
        self.table = positions
        self.head = MLMHead(config, model.vocab_size)

    def forward(self, batch: MicroBatch) -> Decoding:
        """The MLM head at the masked positions."""
        hidden = self.encode(batch.masked_tokens, batch)
        return self.head(hidden.flatten(0, 1)[batch.masked_index], self.word)


class MainModel(Encoder):
    """One chunk of the deep model that detects and corrects replaced tokens."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        tied: TiedParameters,
        groups: ProcessGroupCollection,
        vp_stage: int | None = None,
    ):
        super().__init__(config, model, tied, tied.main_table, groups, vp_stage)
        self.model_type = ModelType.encoder_or_decoder  # asked for by megatron-core's schedules
        if self.post_process:
            self.rtd_head = linear(model.hidden_size, 1)
            self.clm_head = CLMHead(config, model.vocab_size)

    def forward(self, tokens: Tensor, batch: MicroBatch) -> Tensor | tuple[Tensor, Decoding]:
        """Corrupted ids [B, S] to hidden states, on the last stage to (RTD logits [S, B], the CLM head at masks)."""
        hidden = self.encode(tokens, batch)
        if not self.post_process:
            return hidden
        return self.rtd_head(hidden).squeeze(-1), self.clm_head(hidden.flatten(0, 1)[batch.masked_index], self.word)
