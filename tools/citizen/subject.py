"""The folder that is checked, texts to read with it, and how two results are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

TEXTS = (
    "The plot is thin, but the actors carry it with ease.",
    "Nobody asked for a sequel, and nobody will remember this one by the end of the year.",
    "Good.",
)
NUM_LABELS = 3
ORDER = 1e-5
"""Largest difference, of numbers about 1 in fp32, that another order of the same sums explains."""


class Wrong(Exception):
    """What a check found, and what it expected."""


@dataclass(frozen=True)
class Subject:
    """An exported folder; `scratch` is for what checks write."""

    folder: Path
    scratch: Path

    @property
    def tokenizer(self) -> Any:
        """As AutoTokenizer loads it."""
        return transformers.AutoTokenizer.from_pretrained(self.folder)

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether it is one of tools/train_tokenizer.py."""
        # Late: `stranger` reads this file where the package is not to be had.
        from metro_megatron.tokenizer.tokenizer import Tokenizer
        from metro_megatron.tokenizer.trained import TrainedTokenizer

        return isinstance(Tokenizer.from_folder(self.folder), TrainedTokenizer)

    def load(self, auto: str = "AutoModel", **settings: Any) -> Any:
        """What an Auto class loads, in fp32, without dropout; fresh heads are always the same."""
        torch.manual_seed(0)
        kind = getattr(transformers, auto)
        return kind.from_pretrained(self.folder, **{"dtype": torch.float32} | settings).eval()

    def classifier(self, **settings: Any) -> Any:
        """A sequence classifier of NUM_LABELS labels."""
        return self.load("AutoModelForSequenceClassification", **{"num_labels": NUM_LABELS} | settings)

    def rows(self, side: str = "right") -> dict[str, Tensor]:
        """TEXTS as input_ids and attention_mask [3, S], padded on one side."""
        tokenizer = self.tokenizer
        return dict(tokenizer(list(TEXTS), truncation=True, padding=True, padding_side=side, return_tensors="pt"))

    def samples(self) -> list[Tensor]:
        """TEXTS as input_ids [S] without padding."""
        return [torch.tensor(ids) for ids in self.tokenizer(list(TEXTS), truncation=True)["input_ids"]]


Check = Callable[[Subject], str]
"""Returns what was found; raises Wrong, or whatever went wrong."""
Checks = Mapping[str, Check]


def answer(model: Any, input_ids: Tensor) -> Tensor:
    """All numbers that a model of any class returns of ids [B, S], in one row."""
    kind = type(model).__name__
    ids = {"input_ids": input_ids[:, None] if kind == "MetroForMultipleChoice" else input_ids}
    if kind == "MetroForPreTraining":
        ids["noised_input_ids"] = input_ids
    with torch.no_grad():
        found = model(**ids)
    return torch.cat([x.float().flatten() for x in found.to_tuple() if x.is_floating_point()])


def require(condition: bool, text: str) -> None:
    """Raise Wrong with the text unless it holds."""
    if not condition:
        raise Wrong(text)


def equal(found: Tensor, expected: Tensor) -> str:
    """Both are the same, bit by bit."""
    require(found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not torch.equal(found, expected):
        raise Wrong(f"differs by up to {float((found - expected).abs().max()):.1e}, expected no difference")
    return f"{expected.numel()} numbers equal"


def close(found: Tensor, expected: Tensor, tolerance: float = ORDER) -> str:
    """They differ by no more than the tolerance; none is infinite or no number."""
    require(found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    require(bool(expected.isfinite().all()), "the expected numbers are not finite")
    largest = float((found.double() - expected.double()).abs().max())
    require(largest <= tolerance, f"differs by up to {largest:.1e}, allowed {tolerance:.0e}")
    return f"{largest:.1e} apart, allowed {tolerance:.0e}"


def raises(kind: type[Exception], call: Callable[[], object], words: str) -> str:
    """A call raises an exception of a kind that says the words."""
    try:
        call()
    except kind as error:
        require(words in str(error), f"says {error!s:.200}, expected {words!r}")
        return f"{kind.__name__}: {words}"
    raise Wrong(f"raised nothing, expected {kind.__name__}")
