"""What main learns at an early exit, and who left there: our interpretation (model/early_exit.py).

Legend: S positions, B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.views import View
from metro_megatron.objective.rtd import detection_loss
from metro_megatron.objective.term import Panel, Sums, Term, mean
from metro_megatron.schedule import Schedule

if TYPE_CHECKING:
    from metro_megatron.model.early_exit import ExitHead
    from metro_megatron.model.encoder import Reading
    from metro_megatron.parallel.layout import Layout


class ExitDetection(Term):
    """Replaced token detection behind a middle layer, by the same head, over the tokens that go on from there.

    A token that leaves keeps its state, so that replaced token detection at the top scores it by this exit's logit: a
    token's loss is weight times the sum over the exits that it passed, and 1 times where it ended. In evaluation no
    token leaves, and the loss is over all.
    """

    exported = ""
    console = {"depth": "average_depth"}
    panels = (
        Panel("main layers that a token is updated by", {"average_depth": "average depth"}),
        Panel(
            "tokens that left early",
            {"exited_replaced": "of the replaced ones", "exited_original": "of the original ones"},
            is_share=True,
        ),
    )

    def __init__(self, config: Config, layer: int):
        super().__init__(config)
        self.name = f"exit{layer}"
        self.layer: int = layer
        self.sums = {f"{self.name}_loss": 1, f"{self.name}_replaced": 1, f"{self.name}_original": 1}

    @property
    def weight(self) -> Schedule:
        return Schedule(self.config.early_exit.weight * self.config.objective.rtd_weight)

    def head(self, config: object) -> ExitHead:
        from metro_megatron.model.early_exit import ExitHead

        return ExitHead(self.layer, self.config.early_exit.rule)

    def denominator(self, batch: StepBatch) -> int:
        return batch.num_tokens

    def loss(self, reading: Reading, view: View, layout: Layout) -> tuple[Tensor, Sums]:
        exit = reading.heads[self.name]
        is_replaced, is_real = view.is_replaced.t(), view.micro_batch.is_real.t()
        loss = detection_loss(exit.logits, ~is_replaced, is_real & exit.goes_on)
        has_left = is_real & ~exit.goes_on
        return loss, {
            f"{self.name}_loss": loss.detach(),
            f"{self.name}_replaced": (has_left & is_replaced).sum(),
            f"{self.name}_original": (has_left & ~is_replaced).sum(),
        }

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The last exit's are those of all: average depth, and the shares of tokens that left anywhere."""
        tokens, replaced = float(sums["num_tokens"]), float(sums["replaced"])
        found = {f"{self.name}_loss": mean(sums[f"{self.name}_loss"], tokens)}
        layers = self.config.early_exit.layers
        if self.layer != layers[-1]:
            return found
        skipped = 0.0
        for layer, above in zip(layers, [*layers[1:], self.config.model.num_layers], strict=True):
            left = float(sums[f"exit{layer}_replaced"] + sums[f"exit{layer}_original"])  # there or below
            skipped += left * (above - layer)
        return found | {
            "average_depth": self.config.model.num_layers - mean(skipped, tokens),
            "exited_replaced": mean(sums[f"{self.name}_replaced"], replaced),
            "exited_original": mean(sums[f"{self.name}_original"], tokens - replaced),
        }
