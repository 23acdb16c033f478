"""Which losses there are, and which of them a run or an exported model has: the one place where they are listed."""

from __future__ import annotations

from collections.abc import Iterable

from metro_megatron.config.schema import Config
from metro_megatron.objective.clm import CorrectiveLanguageModel
from metro_megatron.objective.cloze import OneChoiceCloze
from metro_megatron.objective.early_exit import ExitDetection
from metro_megatron.objective.mlm import MainMaskedLanguageModel, MaskedLanguageModel
from metro_megatron.objective.rtd import ReplacedTokenDetection
from metro_megatron.objective.scl import SequenceContrast
from metro_megatron.objective.term import Term

MAIN: dict[str, type[Term]] = {
    "rtd": ReplacedTokenDetection,
    "clm": CorrectiveLanguageModel,
    "cloze": OneChoiceCloze,
    "scl": SequenceContrast,
    "mlm": MainMaskedLanguageModel,
}
"""The main model's, by their names in objective.main, in the order of the console and of their sum."""
ALL: tuple[type[Term], ...] = (MaskedLanguageModel, *MAIN.values(), ExitDetection)
"""All that a picture may have to show."""


def main_terms(config: Config) -> list[Term]:
    """The losses of the main model (METRO eq. 9), in one order whatever the option's; then those of its exits."""
    exits = [ExitDetection(config, layer) for layer in config.early_exit.layers]
    return [*(term(config) for name, term in MAIN.items() if name in config.objective.main), *exits]


def num_distractors(terms: Iterable[Term]) -> int:
    """How many distractors a corruptor has to draw at every masked position for losses of main."""
    return max(term.num_distractors for term in terms)


def exported_terms(config: Config) -> list[Term]:
    """The losses whose heads an exported model has; the auxiliary's is the first, where there is an auxiliary."""
    auxiliary = [MaskedLanguageModel(config)] if config.corruption.trains_auxiliary else []
    return [*auxiliary, *(term for term in main_terms(config) if term.exported)]
