"""Frozen features of main while it trains: the tasks of a folder, a few hundred texts of each.

Rows of texts are the same in every layout, and dealt out to the data-parallel ranks: features are equal bit for bit on
any number of them. Tensor-parallel ranks sum in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from metro_megatron.config.rows import RowRule
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch, MicroBatchBuilder, Rows, StepRows
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.masking import Masking
from metro_megatron.data.order import Draws
from metro_megatron.data.samples import NUM_SAMPLE_SPECIALS, build_sample_index
from metro_megatron.parallel.layout import Layout
from metro_megatron.probing.features import EncodedTexts
from metro_megatron.probing.folder import ProbeTask
from metro_megatron.probing.ridge import ridge_scores
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.step import Step

MOST_TEXTS = 256
"""Texts of either side of a task: at base, probes of ten tasks are less than 1% of a hundred steps' FLOPs
(tests/train/test_probes.py)."""


@dataclass(frozen=True)
class Reading:
    """The texts of one task as this rank reads its part of them."""

    task: ProbeTask
    texts: EncodedTexts
    """Those of the train side first."""
    num_train: int
    """Pieces of the train side."""
    micro_batches: list[MicroBatch]
    numbers: list[list[int]]
    """Texts of each micro batch."""
    cells: list[list[int]]
    """Where each of those has its first token in the micro batch's hidden states, rows one after another."""


class Probes:
    """All tasks of a run; nothing is read before the first probe."""

    def __init__(self, config: Config, layout: Layout, corpus: Corpus):
        self.config = config
        self.layout = layout
        self.corpus = corpus

    def figures(self, step: Step) -> dict[str, float]:
        """Every task's metric on the first rank, {} on others. A collective call; parameters have been fetched."""
        found = {}
        for reading in self.readings:
            features = self.features(step, reading)
            if self.layout.rank == 0:
                task, cut = reading.task, reading.num_train
                scores = task.kind.scores(task.train, features[:cut], task.test, features[cut:], ridge_scores)
                found[task.name] = scores.figures[task.kind.metric]
        return found

    @cached_property
    def readings(self) -> list[Reading]:
        """All tasks as this rank reads them."""
        tokenizer = Tokenizer.from_folder(self.corpus.tokenizer_folder)
        return [self._reading(task.first(MOST_TEXTS), tokenizer) for task in self.corpus.probe_tasks]

    def _reading(self, task: ProbeTask, tokenizer: Tokenizer) -> Reading:
        data, layout = self.config.data, self.layout
        train = task.kind.texts(task.train) if task.kind.learns else []
        texts = EncodedTexts.of([*train, *task.kind.texts(task.test)], tokenizer, data.seq_length - NUM_SAMPLE_SPECIALS)
        documents = TokenizedDocuments.from_units([[ids.tolist()] for ids in texts.ids])
        index = build_sample_index([documents], data.seq_length)
        assert len(index) == len(texts.ids), "a text is one sample"
        lengths = index.length + NUM_SAMPLE_SPECIALS
        rows = StepRows.of(lengths, RowRule.of(self.config, 1))
        own = rows.micro_batches[layout.data.rank() :: layout.data.size()]
        if own:
            # The interleaved schedule wants some; what is read twice is the same.
            own += [own[-1]] * (RowRule.of(self.config, 1).least_micro_batches - len(own))
        masking = Masking(self.config.train.seed, 0.0, special_ids=self.config.model.special_ids)
        builder = MicroBatchBuilder(index, [documents.tokens], masking, data.is_packed)
        everything = np.arange(len(index))
        draws = Draws(np.zeros_like(everything), everything)
        return Reading(
            task,
            texts,
            int(texts.first_piece[len(train)]),
            [builder.build(one, rows.length, draws) for one in own],
            [np.concatenate(one).tolist() for one in own],
            [_first_cells(one, lengths, rows.length) for one in own],
        )

    def features(self, step: Step, reading: Reading) -> NDArray[np.float32]:
        """Of one task's pieces [P, H], on every rank. A collective call; parameters have been fetched."""
        texts = reading.texts
        features = torch.zeros(texts.num_pieces, self.config.model.hidden_size, device=self.layout.device)

        def use(number: int, hidden: Tensor) -> None:
            if self.layout.tensor.rank() == 0:
                numbers = reading.numbers[number]
                means = texts.means(hidden.transpose(0, 1).flatten(0, 1), numbers, reading.cells[number])
                features[torch.from_numpy(texts.pieces(numbers)).to(features.device)] = means

        if reading.micro_batches:
            step.read_originals(reading.micro_batches, use)
        # One rank has each row, the others have zeros.
        dist.all_reduce(features, group=self.layout.world)
        return features.cpu().numpy()


def _first_cells(rows: Rows, lengths: NDArray[np.integer], row_length: int) -> list[int]:
    """b * S + s of the first token behind <s> of every sample in the rows."""
    cells = []
    for number, row in enumerate(rows):
        cell = number * row_length + 1
        for sample in row.tolist():
            cells.append(cell)
            cell += int(lengths[sample])
    return cells
