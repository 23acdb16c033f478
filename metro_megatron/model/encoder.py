"""The auxiliary model, the main model's chunks, and the parameters both use.

Legend: S positions, B rows, H hidden, D width of the token table, M masked positions, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from metro_megatron.config.schema import ModelConfig, SharedPart
from metro_megatron.data.batch import MicroBatch
from metro_megatron.data.views import View
from metro_megatron.model.early_exit import ExitHead
from metro_megatron.model.heads import TiedDecoder, decoder_bias
from metro_megatron.model.layer import block_spec, linear, parts_of
from metro_megatron.model.norm import LayerNorm, mark_sequence_parallel
from metro_megatron.model.position import Positions, position_table
from metro_megatron.model.sequences import AUXILIARY_SEEDS, EMBEDDING_SITE, Sequences, sequences_of


def token_table(config: TransformerConfig, model_config: ModelConfig, group: Any) -> VocabParallelEmbedding:
    """The token embedding, its rows split over the tensor-parallel ranks of group."""
    return VocabParallelEmbedding(
        model_config.padded_vocab_size,
        model_config.table_width,
        init_method=config.init_method,
        reduce_scatter_embeddings=config.sequence_parallel,
        config=config,
        tp_group=group,
    )


@dataclass(frozen=True)
class Borrowed:
    """What an encoder takes from a module of the shared home; what is None it owns.

    A pipeline's first and last stage need the token table, and all of them the positions' table: main always borrows
    these two. The owner trains them, whoever borrows adds gradients.
    """

    word: VocabParallelEmbedding | None = None
    position: torch.nn.Embedding | None = None
    norm: LayerNorm | None = None
    table: Positions | None = None
    decoder: ColumnParallelLinear | None = None
    """The bias of language modelling heads."""

    def to_head(self, head: torch.nn.Module) -> torch.nn.Module:
        """The head, with the borrowed bias where it is a decoder."""
        if self.decoder is not None and isinstance(head, TiedDecoder):
            head.borrow(self.decoder)
        return head


class TiedParameters(MegatronModule):
    """What both phases of a step use: main's token embedding and position table, and what both encoders share.

    The levels of sharing are METRO-T0's: nothing, tokens (METRO), positions too (METRO's baseline), the norm too; and
    the bias of both language modelling heads (METRO's baseline).
    """

    def __init__(self, config: TransformerConfig, model_config: ModelConfig, groups: ProcessGroupCollection):
        super().__init__(config=config)
        self.shared = model_config.shared_parts
        self.word = token_table(config, model_config, groups.tp)
        self.main_table = Positions(config, model_config.position_scheme, groups.tp)
        if "position" in self.shared:
            self.position = position_table(config, model_config)
        if "norm" in self.shared:
            self.norm = LayerNorm(config, hidden_size=model_config.table_width, eps=model_config.layer_norm_eps)
        if "decoder" in self.shared:
            self.decoder = decoder_bias(config, model_config)

    def lend(self, *parts: SharedPart | Literal["table"]) -> Borrowed:
        """The named parts; `table` is main's."""
        return Borrowed(**{part: self.main_table if part == "table" else getattr(self, part) for part in parts})

    def for_main(self) -> Borrowed:
        """All there is."""
        return self.lend("word", "table", *(part for part in self.shared if part != "word"))

    def for_auxiliary(self) -> Borrowed:
        """What both encoders share."""
        return self.lend(*self.shared)


class Embedding(MegatronModule):
    """dropout(LN(E[token] + P[position])), of width D; without P where positions are untied (TUPE).

    An encoder of another width H projects it, x W + b (ELECTRA), by a matrix of its own, whatever it borrows.
    """

    def __init__(
        self, config: TransformerConfig, model_config: ModelConfig, borrowed: Borrowed, groups: ProcessGroupCollection
    ):
        super().__init__(config=config)
        self.tensor_group = groups.tp
        if borrowed.word is None:
            self.word = token_table(config, model_config, groups.tp)
        self.adds_positions = not model_config.untied_positions
        if self.adds_positions and borrowed.position is None:
            self.position = position_table(config, model_config)
        if borrowed.norm is None:
            self.norm = LayerNorm(config, hidden_size=model_config.table_width, eps=model_config.layer_norm_eps)
        self.projection: torch.nn.Linear | None = None
        if config.hidden_size != model_config.table_width:
            self.projection = linear(model_config.table_width, config.hidden_size)
            mark_sequence_parallel(self.projection, config)
        self.borrowed = (borrowed,)  # in a tuple: what is borrowed is not registered here, its owner trains it

    def forward(self, tokens: Tensor, position_ids: Tensor, sequences: Sequences) -> Tensor:
        """tokens and position_ids [B, S] to [S, B, H], or this rank's part of S under sequence parallelism."""
        (borrowed,) = self.borrowed
        words = (borrowed.word or self.word)(tokens)
        positions = position_ids.t()
        if self.config.sequence_parallel:
            # The token table has already split the positions and put them first.
            positions = positions.chunk(self.tensor_group.size())[self.tensor_group.rank()]
        else:
            words = words.transpose(0, 1).contiguous()
        dropout = None
        if self.training and sequences.dropout is not None:
            dropout = sequences.dropout.of_rows(self.config.hidden_dropout, EMBEDDING_SITE, is_last=True)
        added = (borrowed.position or self.position)(positions) if self.adds_positions else None
        embedded = (borrowed.norm or self.norm)(words, added, dropout=dropout)
        return embedded if self.projection is None else self.projection(embedded)


class Encoder(MegatronModule):
    """Embedding and layers, or the part of them that one pipeline stage holds."""

    def __init__(
        self,
        config: TransformerConfig,
        model_config: ModelConfig,
        borrowed: Borrowed,
        groups: ProcessGroupCollection,
        vp_stage: int | None = None,
    ):
        super().__init__(config=config)
        pp, rank = groups.pp.size(), groups.pp.rank()
        chunks = config.virtual_pipeline_model_parallel_size or 1
        self.pre_process = rank == 0 and not vp_stage
        self.post_process = rank == pp - 1 and (vp_stage or 0) == chunks - 1
        self.vp_stage = vp_stage
        self.borrowed = (borrowed,)  # in a tuple, so that it is not registered as a submodule
        self.tensor_group = groups.tp
        if self.pre_process:
            self.embedding = Embedding(config, model_config, borrowed, groups)
        if borrowed.table is None:
            self.table = Positions(config, model_config.position_scheme, groups.tp)
        num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank)
        self.block = TransformerBlock(
            config,
            block_spec(parts_of(config), num_layers, model_config.norm_first),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )

    @property
    def word(self) -> Tensor:
        """This rank's rows of the token embedding [V, D]."""
        return (self.borrowed[0].word or self.embedding.word).weight

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """megatron-core's schedules hand over the previous stage's output here."""
        self.block.set_input_tensor(tensors[0])

    def encode(self, tokens: Tensor, micro_batch: MicroBatch, judge: LayerJudge | None = None) -> Tensor:
        """Hidden states [S, B, H], whole on every tensor-parallel rank on the last stage.

        tokens [B, S] are the masked or the corrupted ids of micro_batch; judge is for heads on middle layers.
        """
        sequences = self._sequences(micro_batch)
        sequences.judge = judge
        hidden = self._enter(tokens, micro_batch, sequences)
        hidden = self.block(hidden_states=hidden, attention_mask=None, packed_seq_params=sequences)
        return self._whole(hidden) if self.post_process else hidden

    def _enter(self, tokens: Tensor, micro_batch: MicroBatch, sequences: Sequences) -> Tensor:
        """Hidden states below the first layer; sequences are told what positions add in all layers."""
        if self.pre_process:
            hidden = self.embedding(tokens, micro_batch.position_ids, sequences)
        else:
            hidden = self.block.input_tensor
        assert sequences.samples is not None
        positions = self.borrowed[0].table or self.table
        hidden, sequences.added = positions(hidden, sequences.samples.longest)
        if not self.pre_process:
            self.block.set_input_tensor(hidden)  # the only thing that the block reads there
        return hidden

    def _sequences(self, micro_batch: MicroBatch) -> Sequences:
        sequence_group = self.tensor_group if self.config.sequence_parallel else None
        return sequences_of(micro_batch, self.config.num_layers, sequence_group)

    def _whole(self, hidden: Tensor) -> Tensor:
        """All positions [S, B, H], for heads."""
        if not self.config.sequence_parallel:
            return hidden
        # What follows is the same on all tensor-parallel ranks: its gradient is split, not summed.
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.tensor_group)


class AuxiliaryModel(Encoder):
    """The masked language model that proposes replacements, shallower in METRO: an encoder and one head."""

    def __init__(
        self,
        config: TransformerConfig,
        model_config: ModelConfig,
        borrowed: Borrowed,
        groups: ProcessGroupCollection,
        head: torch.nn.Module,
    ):
        super().__init__(config, model_config, borrowed, groups)
        self.head = borrowed.to_head(head)

    def forward(self, micro_batch: MicroBatch) -> Any:
        """What the head says of the masked ids."""
        hidden = self.encode(micro_batch.masked_tokens, _with_auxiliary_seed(micro_batch))
        return self.head(hidden, micro_batch, self.word)


def _with_auxiliary_seed(micro_batch: MicroBatch) -> MicroBatch:
    if micro_batch.dropout_seed is None:
        return micro_batch
    return replace(micro_batch, dropout_seed=micro_batch.dropout_seed + AUXILIARY_SEEDS)


@dataclass(frozen=True)
class Reading:
    """What a chunk of the main model makes of a view."""

    hidden: Tensor
    """[S, B, H]; between stages, and only there, this rank's part of S under sequence parallelism."""
    heads: dict[str, Any]
    """What each head says, by the name of its loss."""
    is_last: bool
    """Whether the chunk is the last one, behind which the losses are."""


Judge = Callable[[str, Reading], Tensor]
"""Makes of the named head's reading on a middle layer the loss that rides on its hidden states."""

LayerJudge = Callable[[str, Tensor, Sequences], Tensor]
"""The same as a layer calls it, which knows its hidden states [S, B, H] and where samples lie."""


class _Ride(torch.autograd.Function):
    """Hands hidden states on; in backward, the loss gets the gradient 1 as if it had been called by itself.

    A loss of a middle layer may belong to another stage or chunk than the last one, where the schedule begins its
    backward passes. megatron-core's losses of experts take the same way.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(loss)
        return hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)


class HeadSeat(Protocol):
    """What main asks of a loss (an objective.term.Term)."""

    @property
    def name(self) -> str: ...

    @property
    def layer(self) -> int | None: ...

    def head(self, config: TransformerConfig) -> torch.nn.Module | None: ...


class MainModel(Encoder):
    """One chunk of the model that reads corrupted text, with the heads whose layers it holds."""

    def __init__(
        self,
        config: TransformerConfig,
        model_config: ModelConfig,
        borrowed: Borrowed,
        groups: ProcessGroupCollection,
        seats: Sequence[HeadSeat],
        vp_stage: int | None = None,
    ):
        super().__init__(config, model_config, borrowed, groups, vp_stage)
        self.model_type = ModelType.encoder_or_decoder  # asked for by megatron-core's schedules
        self.seated: list[str] = []
        """Heads behind this chunk's last layer."""
        for seat in seats:
            if seat.layer is None and self.post_process:
                self.seated += [seat.name] if self._seat(seat) else []
            for layer in self.block.layers:
                if layer.layer_number == seat.layer:
                    self._seat(seat)
                    layer.register_forward_hook(partial(self._ask_layer, seat.name), with_kwargs=True)

    def forward(self, view: View, judge: Judge | None = None) -> Reading:
        """Read a view. Without judge, heads on middle layers are not asked."""

        def of_layer(name: str, hidden: Tensor, sequences: Sequences) -> Tensor:
            assert judge is not None
            head = getattr(self, f"{name}_head", None)
            if isinstance(head, ExitHead):
                norm = self.block.final_layernorm  # pre-LN: the head behind the last layer reads normed states
                logits = self._ask(head.of, hidden if norm is None else norm(hidden), view)
                return judge(name, Reading(hidden, {name: head(logits, sequences, view.exits)}, is_last=False))
            return judge(name, Reading(hidden, {name: self._ask(name, hidden, view)}, is_last=False))

        hidden = self.encode(view.tokens, view.micro_batch, of_layer if judge else None)
        return Reading(hidden, {name: self._ask(name, hidden, view) for name in self.seated}, self.post_process)

    def read_masked(self, micro_batch: MicroBatch, num_layers: int) -> Tensor:
        """Hidden states [S, B, H] of the masked ids behind so many layers, all of which are in this chunk."""
        sequences = self._sequences(_with_auxiliary_seed(micro_batch))
        hidden = self._enter(micro_batch.masked_tokens, micro_batch, sequences)
        for layer in self.block.layers[:num_layers]:
            hidden, _ = layer(hidden, packed_seq_params=sequences)
        return self._whole(hidden)

    def _seat(self, seat: HeadSeat) -> bool:
        head = seat.head(self.config)
        if head is not None:
            self.add_module(f"{seat.name}_head", self.borrowed[0].to_head(head))
        return head is not None

    def _ask(self, name: str, hidden: Tensor, view: View) -> Any:
        head = getattr(self, f"{name}_head", None)
        return None if head is None else head(hidden, view.micro_batch, self.word)

    def _ask_layer(self, name: str, layer: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook: what it returns stands for the layer's output. Recomputation passes here, too."""
        hidden, context = output
        sequences = kwargs["packed_seq_params"]
        if sequences.judge is None:
            return output
        return _Ride.apply(hidden, sequences.judge(name, self._whole(hidden), sequences)), context


TIED = "tied"
"""Name of the shared module that both phases use."""


@dataclass(frozen=True)
class Pair:
    """The whole of what is trained, as one rank holds it.

    The modules that every pipeline rank uses, and main as one chunk per virtual pipeline stage of this rank.
    """

    shared: Mapping[str, MegatronModule]
    """By name: TIED, and what trains in phase 1 only, such as the auxiliary model."""
    main: list[MainModel]

    def modules(self) -> Iterator[tuple[str, MegatronModule]]:
        """(prefix of global names, module) of everything that has parameters, each once."""
        for name, module in self.shared.items():
            yield f"{name}.", module
        for chunk in self.main:
            yield "main.", chunk

    def named(self) -> Iterator[tuple[str, MegatronModule]]:
        """(a name of its own, module), in the same order."""
        yield from self.shared.items()
        for number, chunk in enumerate(self.main):
            yield f"main{number}", chunk
