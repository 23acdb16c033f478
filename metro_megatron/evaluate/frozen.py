"""Probing tasks asked of an exported encoder whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from metro_megatron.evaluate.scores import Score
from metro_megatron.hf.modeling_metro import MetroModel
from metro_megatron.probing.features import EncodedTexts
from metro_megatron.probing.folder import ProbeTask
from metro_megatron.probing.kinds import Scores
from metro_megatron.probing.ridge import ridge_scores
from metro_megatron.tokenizer.tokenizer import Tokenizer

BATCH_TOKENS = 4096
"""Most places of a batch."""


def probe(model: MetroModel, tokenizer: Tokenizer, task: ProbeTask, layer: int = 0) -> tuple[Scores, int]:
    """Scores of the task, and how many texts were cut at the model's positions.

    Equal weights and tasks give equal scores: rows of a batch depend on the texts alone, and nothing is drawn.
    """
    model.eval()
    features, num_cut = [], 0
    for rows in (task.train if task.kind.learns else [], task.test):
        texts = EncodedTexts.of(task.kind.texts(rows), tokenizer, model.config.max_position_embeddings - 2)
        features.append(frozen_features(model, texts, layer))
        num_cut += texts.num_cut
    return task.kind.scores(task.train, features[0], task.test, features[1], ridge_scores), num_cut


@torch.no_grad()
def frozen_features(model: MetroModel, texts: EncodedTexts, layer: int = 0) -> NDArray[np.float32]:
    """[P, H] means of the hidden states behind a layer of main, from 1; 0: what its heads read."""
    found = np.zeros((texts.num_pieces, model.config.hidden_size), np.float32)
    for numbers in _batches([len(ids) for ids in texts.ids]):
        length = max(len(texts.ids[one]) for one in numbers) + 2
        config = model.config
        ids = np.full((len(numbers), length), config.pad_token_id)
        for row, one in enumerate(numbers):
            content = texts.ids[one]
            ids[row, : len(content) + 2] = [config.bos_token_id, *content, config.eos_token_id]
        given = torch.from_numpy(ids).to(model.device)
        output = model(given, given != config.pad_token_id, output_hidden_states=bool(layer))
        hidden = output.hidden_states[layer] if layer else output.last_hidden_state
        cells = [row * length + 1 for row in range(len(numbers))]
        found[texts.pieces(numbers)] = texts.means(hidden.flatten(0, 1), numbers, cells).cpu().numpy()
    return found


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of texts, the shortest first, as many together as have BATCH_TOKENS places."""
    batches: list[list[int]] = []
    for number in np.argsort(lengths, kind="stable").tolist():
        if not batches or (len(batches[-1]) + 1) * (lengths[number] + 2) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(number)
    return batches


def probe_all(
    model: MetroModel,
    tokenizer: Tokenizer,
    tasks: Sequence[ProbeTask],
    layer: int,
    on_task: Callable[[ProbeTask, Scores], object],
) -> tuple[dict[str, Scores], int]:
    """Scores by task, and texts that were cut in all of them."""
    found, cut = {}, 0
    for task in tasks:
        found[task.name], num_cut = probe(model, tokenizer, task, layer)
        cut += num_cut
        on_task(task, found[task.name])
    return found, cut


def item_scores(tasks: Sequence[ProbeTask], scores: dict[str, Scores]) -> Iterator[Score]:
    """Of every test row."""
    for task in tasks:
        for row, score in zip(task.test, scores[task.name].items, strict=True):
            yield Score(task.name, row["id"], score)
