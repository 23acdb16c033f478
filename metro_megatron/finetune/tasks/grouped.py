"""Classification whose texts are scored in groups: the answers to one question, two versions of one sentence."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.finetune.task import Outputs, Row
from metro_megatron.finetune.tasks.classification import Classification


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


def grouped(values: NDArray[Any], groups: Sequence[Any]) -> list[NDArray[Any]]:
    """The values of every group, in the order in which groups begin."""
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return [values[own] for own in members.values()]
