"""Classification whose texts are scored in groups: answers to one question, versions of one sentence, phenomena."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.finetune.metrics import classification_scores
from metro_megatron.finetune.task import Outputs, Row
from metro_megatron.finetune.tasks.classification import Classification

CATEGORIES = ("lexical_semantics", "predicate_argument_structure", "logic", "knowledge")
"""Of phenomena, GLUE's."""


class GroupedAnswers(Classification):
    """Whether each of the answers to a question is right (MultiRC).

    `f1a` is the F1 of right answers over all of them, `exact` the share of questions all of whose answers are told.
    """

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        scores = super().scores(outputs, rows)
        is_told = outputs[0].argmax(-1) == np.array([row["label"] for row in rows])
        exact = [group.all() for group in grouped(is_told, self.validation.groups)]
        return {**scores, "f1a": scores["f1"], "exact": float(np.mean(exact))}


class MinimalPairs(Classification):
    """Sentences that differ in a person's gender alone (AX-g): `gender_parity` is the share of pairs told alike."""

    own_scores = ("accuracy", "gender_parity")

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        alike = [(group == group[0]).all() for group in grouped(outputs[0].argmax(-1), self.validation.groups)]
        return {**super().scores(outputs, rows), "gender_parity": float(np.mean(alike))}


class Diagnostic(Classification):
    """Pairs that each show some linguistic phenomena (AX, AX-b): Matthews correlation, also of each category of these.

    Groups are tuples of CATEGORIES, empty where a pair is of none.
    """

    own_scores = ("mcc", "accuracy")

    @property
    def score_names(self) -> tuple[str, ...]:
        shown = {category for group in self.validation.groups for category in group}
        return (*super().score_names, *(f"mcc_{one}" for one in CATEGORIES if one in shown))

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        predicted, labels = outputs[0].argmax(-1), np.array([row["label"] for row in rows])
        scores = super().scores(outputs, rows)
        for category in CATEGORIES:
            own = np.array([category in group for group in self.validation.groups], dtype=bool)
            if own.any():
                scores[f"mcc_{category}"] = classification_scores(predicted[own], labels[own])["mcc"]
        return scores


def grouped(values: NDArray[Any], groups: Sequence[Any]) -> list[NDArray[Any]]:
    """The values of every group, in the order in which groups begin."""
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return [values[own] for own in members.values()]
