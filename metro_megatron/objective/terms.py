"""Which losses there are, and which of them a run has: the one place where they are listed."""

from __future__ import annotations

from metro_megatron.config.schema import Config
from metro_megatron.objective.clm import CorrectiveLanguageModel
from metro_megatron.objective.early_exit import ExitDetection
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.objective.rtd import ReplacedTokenDetection
from metro_megatron.objective.term import Term

ALL: tuple[type[Term], ...] = (MaskedLanguageModel, ReplacedTokenDetection, CorrectiveLanguageModel)
"""In the order of the console."""


def main_terms(config: Config) -> list[Term]:
    """The losses of the main model (METRO eq. 9)."""
    exits = [ExitDetection(config, layer) for layer in config.early_exit.layers]
    return [ReplacedTokenDetection(config), CorrectiveLanguageModel(config), *exits]
