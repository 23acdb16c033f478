"""Of many candidates for a gap in a query the one that a passage speaks for is found (ReCoRD)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.answers import exact_match, word_f1
from metro_megatron.finetune.examples import ID
from metro_megatron.finetune.task import Encoded, Outputs, Row
from metro_megatron.finetune.tasks.multiple_choice import Choice, MultipleChoice


@dataclass(frozen=True)
class Query(Choice):
    """A passage, and the query with the gap filled by each of the entities; label is 0, or None without answers."""

    entities: tuple[str, ...] = ()
    answers: tuple[str, ...] | None = None


class Ranking(MultipleChoice):
    """Learns from pairs of a wrong and a right candidate, and takes of all candidates the one that scores highest.

    As in METRO's appendix A. Train holds pairs (`Choice`), validation queries.
    """

    unit = "queries"
    makes = "ranker"
    own_scores = ("f1", "exact")
    has_validation_loss = False

    def settings(self) -> dict[str, Any]:
        if any(len(one.choices) != 2 for one in self.train):
            raise UserError("Ranking learns from pairs of candidates")
        return {"num_labels": 1}

    def encode(self, tokenizer: PreTrainedTokenizerFast, examples: list[Choice]) -> Encoded:
        """Of pairs a row each; of queries one for every candidate."""
        flat = [
            single
            for one in examples
            for single in (
                [Choice(one.text, (text,), one.label) for text in one.choices] if isinstance(one, Query) else [one]
            )
        ]
        return super().encode(tokenizer, flat)

    def describe_labels(self) -> str:
        return "train's are pairs of candidates"

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        found = list(zip(self._found(outputs), self._queries, strict=True))
        return {
            "f1": float(np.mean([word_f1(text, one.answers or (), False) for (text, _), one in found])),
            "exact": float(np.mean([exact_match(text, one.answers or ()) for (text, _), one in found])),
        }

    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        lines = []
        for one, (text, scores) in zip(self._queries, self._found(outputs), strict=True):
            label = {} if one.answers is None else {"label": list(one.answers)}
            candidates = dict(zip(one.entities, scores.tolist(), strict=True))
            lines.append({ID: one.id, **label, "prediction": text, "scores": candidates})
        return lines

    def facts(self) -> dict[str, Any]:
        return {}

    def remarks(self, outputs: Outputs, rows: Sequence[Row]) -> list[str]:
        return []

    @property
    def _queries(self) -> list[Query]:
        return [one for one in self.validation if isinstance(one, Query)]

    def _found(self, outputs: Outputs) -> list[tuple[str, NDArray[np.floating]]]:
        """The best candidate of every query, and the scores of all."""
        found, begin = [], 0
        for one in self._queries:
            scores = outputs[0][begin : begin + len(one.entities), 0]
            begin += len(one.entities)
            found.append((one.entities[scores.argmax()], scores))
        return found
