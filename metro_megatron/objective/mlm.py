"""Masked language modelling: of what fills masks (METRO eq. 4; figures aux_*), or of main and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fused.linear_cross_entropy import Statistics
from metro_megatron.objective.term import Panel, Sums, mean
from metro_megatron.objective.vocabulary import LanguageModel
from metro_megatron.schedule import Schedule

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class MaskedLanguageModel(LanguageModel):
    """-log p(original) at masked positions, of weight 1 where it is learned; the samples are counted with it.

    A frozen model's has weight 0: it is a figure.
    """

    name = "aux"
    exported = "mlm"
    sums = {"aux_loss": 1, "aux_correct": 1, "sample_correct": 1}
    panels = (
        Panel("MLM loss of the auxiliary model (nats)", {"aux_loss": "MLM"}),
        Panel("language modeling accuracy", {"aux_accuracy": "MLM"}),
    )

    @property
    def weight(self) -> Schedule:
        return Schedule(0.0 if self.config.corruption.source == "frozen" else 1.0)

    def head(self, config: TransformerConfig) -> nn.Module:
        from metro_megatron.model.heads import MLMHead

        return MLMHead(config, self.config.model)

    def summed(self, found: Statistics, targets: Tensor) -> tuple[Tensor, Sums]:
        assert found.sampled is not None, "its sums count what was drawn"
        loss, sums = super().summed(found, targets)
        return loss, {**sums, "sample_correct": (found.sampled == targets).sum()}

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        sampled = mean(sums["sample_correct"], sums["num_masked"])
        return {**super().figures(sums), "sampled_accuracy": sampled}

    def exported_head(self, model: nn.Module) -> nn.Module:
        return model.get_submodule("auxiliary_head")

    def exported_sums(self, logits: Tensor, tokens: Tensor, originals: Tensor, is_masked: Tensor) -> Sums:
        same = (tokens == originals)[is_masked].sum()
        return {**super().exported_sums(logits, tokens, originals, is_masked), "sample_correct": same}


class MainMaskedLanguageModel(LanguageModel):
    """-log p(original) at masked positions of a text that no corruptor has filled: BERT and RoBERTa, without a pair."""

    name = "mlm"
    exported = "mlm"
    sums = {"mlm_loss": 1, "mlm_correct": 1}
    panels = (
        Panel("MLM loss of the main model (nats)", {"mlm_loss": "MLM"}),
        Panel("language modeling accuracy", {"mlm_accuracy": "MLM of the main model"}),
    )
