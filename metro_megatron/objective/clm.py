"""Corrective language modelling, simplified: main names the original at every masked position (METRO eq. 8)."""

from __future__ import annotations

from metro_megatron.objective.term import Panel
from metro_megatron.objective.vocabulary import LanguageModel
from metro_megatron.schedule import Schedule


class CorrectiveLanguageModel(LanguageModel):
    """-log p(original) at masked positions, whether or not the auxiliary model had put the original there."""

    name = "clm"
    exported = "clm"
    sums = {"clm_loss": 1, "clm_correct": 1}
    panels = (
        Panel("CLM loss of the main model (nats)", {"clm_loss": "CLM"}),
        Panel("language modeling accuracy", {"clm_accuracy": "CLM"}),
    )

    @property
    def weight(self) -> Schedule:
        return Schedule(self.config.objective.clm_weight)
