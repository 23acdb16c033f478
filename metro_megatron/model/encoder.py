"""The auxiliary model, the main model's chunks, and the parameters both use.

Legend: S positions, B rows, H hidden, M masked positions, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

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
from metro_megatron.data.views import View
from metro_megatron.model.early_exit import ExitHead
from metro_megatron.model.layer import LOCAL, block_spec
from metro_megatron.model.norm import LayerNorm
from metro_megatron.model.position import Positions, position_table
from metro_megatron.model.sequences import EMBEDDING_SITE, Sequences, sequences_of


def token_table(config: TransformerConfig, model_config: ModelConfig, group: Any) -> VocabParallelEmbedding:
    """The token embedding, its rows split over the tensor-parallel ranks of group."""
    return VocabParallelEmbedding(
        model_config.padded_vocab_size,
        model_config.hidden_size,
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


class TiedParameters(MegatronModule):
    """What both phases of a step use: the token embedding and main's relative-position table.

    shared_parts: what main's embedding shares with another encoder beside the token table.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model_config: ModelConfig,
        groups: ProcessGroupCollection,
        shared_parts: Collection[Literal["position", "norm"]] = (),
    ):
        super().__init__(config=config)
        self.word = token_table(config, model_config, groups.tp)
        self.main_table = Positions(config, model_config.position_scheme, groups.tp)
        if "position" in shared_parts:
            self.position = position_table(config, model_config)
        if "norm" in shared_parts:
            self.norm = LayerNorm(config, hidden_size=model_config.hidden_size, eps=model_config.layer_norm_eps)

    def lend(self, *parts: Literal["word", "position", "norm", "table"]) -> Borrowed:
        """The named parts; `table` is main's."""
        return Borrowed(**{part: self.main_table if part == "table" else getattr(self, part) for part in parts})


class Embedding(MegatronModule):
    """dropout(LN(E[token] + P[position]))."""

    def __init__(
        self, config: TransformerConfig, model_config: ModelConfig, borrowed: Borrowed, groups: ProcessGroupCollection
    ):
        super().__init__(config=config)
        self.tensor_group = groups.tp
        if borrowed.word is None:
            self.word = token_table(config, model_config, groups.tp)
        if borrowed.position is None:
            self.position = position_table(config, model_config)
        if borrowed.norm is None:
            self.norm = LayerNorm(config, hidden_size=model_config.hidden_size, eps=model_config.layer_norm_eps)
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
        position, norm = borrowed.position or self.position, borrowed.norm or self.norm
        return norm(words, position(positions), dropout=dropout)


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
        table = borrowed.table or Positions(config, model_config.position_scheme, groups.tp)
        num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank)
        self.block = TransformerBlock(
            config,
            block_spec(LOCAL, num_layers, table),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if borrowed.table is None:
            self.table = table

    @property
    def word(self) -> Tensor:
        """This rank's rows of the token embedding [V, H]."""
        return (self.borrowed[0].word or self.embedding.word).weight

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """megatron-core's schedules hand over the previous stage's output here."""
        self.block.set_input_tensor(tensors[0])

    def encode(self, tokens: Tensor, micro_batch: MicroBatch, judge: LayerJudge | None = None) -> Tensor:
        """Hidden states [S, B, H], whole on every tensor-parallel rank on the last stage.

        tokens [B, S] are the masked or the corrupted ids of micro_batch; judge is for heads on middle layers.
        """
        sequence_group = self.tensor_group if self.config.sequence_parallel else None
        sequences = sequences_of(micro_batch, self.config.num_layers, sequence_group)
        sequences.judge = judge
        hidden = self.embedding(tokens, micro_batch.position_ids, sequences) if self.pre_process else None
        hidden = self.block(hidden_states=hidden, attention_mask=None, packed_seq_params=sequences)
        return self._whole(hidden) if self.post_process else hidden

    def _whole(self, hidden: Tensor) -> Tensor:
        """All positions [S, B, H], for heads."""
        if not self.config.sequence_parallel:
            return hidden
        # What follows is the same on all tensor-parallel ranks: its gradient is split, not summed.
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.tensor_group)


class AuxiliaryModel(Encoder):
    """The shallow masked language model that proposes replacements: an encoder and one head."""

    def __init__(
        self,
        config: TransformerConfig,
        model_config: ModelConfig,
        borrowed: Borrowed,
        groups: ProcessGroupCollection,
        head: torch.nn.Module,
    ):
        super().__init__(config, model_config, borrowed, groups)
        self.head = head

    def forward(self, micro_batch: MicroBatch) -> Any:
        """What the head says of the masked ids."""
        return self.head(self.encode(micro_batch.masked_tokens, micro_batch), micro_batch, self.word)


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
    """One chunk of the deep model that reads corrupted text, with the heads whose layers it holds."""

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

    def _seat(self, seat: HeadSeat) -> bool:
        head = seat.head(self.config)
        if head is not None:
            self.add_module(f"{seat.name}_head", head)
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
