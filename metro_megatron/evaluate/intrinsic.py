"""How well an exported pair fills, detects and corrects on text it has not seen.

Masks and replacements are functions of (seed, sample, position), so a figure does not depend on the batch size.
Legend: n samples, S positions, T tokens without padding, M masked positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.masking import Masking
from metro_megatron.data.order import Draws
from metro_megatron.data.samples import SampleIndex, build_sample_index
from metro_megatron.errors import UserError
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.randomness import Purpose, uniform
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.vocabulary import BOS_ID, EOS_ID, MASK_ID, PAD_ID

MASK_PROBABILITY = 0.15


@dataclass(frozen=True)
class MaskedSamples:
    """A batch before any model has seen it."""

    ids: Tensor
    """[n, S] original tokens with <s>, </s> and padding on the right."""
    is_masked: Tensor
    """[n, S]"""
    noise: Tensor
    """[M] float64 uniform numbers that draw the replacements, in the order of is_masked's rows."""

    @property
    def is_real(self) -> Tensor:
        """[n, S] where there are tokens, specials included."""
        return self.ids != PAD_ID


@dataclass(frozen=True)
class Guesses:
    """What the pair makes of a batch."""

    mlm_logits: Tensor
    """[M, V] of the auxiliary model."""
    noised: Tensor
    """[n, S] ids with the auxiliary model's samples at the masked positions."""
    rtd_logits: Tensor
    """[n, S]; sigmoid is the probability of "original"."""
    clm_logits: Tensor
    """[M, V] of the main model."""


def held_out_text(documents: Iterable[Sequence[str]], tokenizer: Tokenizer) -> TokenizedDocuments:
    """Encode documents, each a sequence of units. Raises UserError if there is no text in them."""
    text = TokenizedDocuments.from_units(map(tokenizer.encode_batch, documents))
    if not len(text.tokens):
        raise UserError("the input holds no text to evaluate on")
    return text


def masked_samples(text: TokenizedDocuments, index: SampleIndex, ids: NDArray[np.int64], seed: int) -> MaskedSamples:
    """The samples with numbers `ids` of `index`, masked as in pretraining."""
    lengths = index.length[ids]
    draws = Draws(np.zeros_like(ids), ids)
    row, position = Masking(seed, MASK_PROBABILITY).positions(draws, lengths)
    tokens = np.full((len(ids), int(lengths.max()) + 2), PAD_ID, dtype=np.int64)
    tokens[:, 0] = BOS_ID
    for number, (start, length) in enumerate(zip(index.start[ids], lengths, strict=True)):
        tokens[number, 1 : length + 1] = text.tokens[start : start + length]
        tokens[number, length + 1] = EOS_ID
    is_masked = np.zeros_like(tokens, dtype=bool)
    is_masked[row, position] = True
    noise = uniform(seed, Purpose.SAMPLE, ids[row], position)
    return MaskedSamples(torch.from_numpy(tokens), torch.from_numpy(is_masked), torch.from_numpy(noise))


@torch.no_grad()
def guess(model: MetroForPreTraining, batch: MaskedSamples) -> Guesses:
    """Fill with the auxiliary model, sample its softmax, let the main model judge; logits on the CPU.

    LM heads are applied at masked positions only.
    """
    device = model.device
    ids, is_masked, attention_mask = (x.to(device) for x in (batch.ids, batch.is_masked, batch.is_real))
    words = model.metro.embeddings.word_embeddings
    auxiliary = model.auxiliary(words(ids.masked_fill(is_masked, MASK_ID)), attention_mask).last_hidden_state
    mlm_logits = model.auxiliary_head(auxiliary[is_masked]).float()
    samples = sample_softmax(mlm_logits, batch.noise.to(device))
    noised = ids.masked_scatter(is_masked, samples)
    hidden = model.metro(noised, attention_mask).last_hidden_state
    rtd_logits = model.rtd_head(hidden).squeeze(-1).float()
    clm_logits = model.clm_head(hidden[is_masked]).float()
    return Guesses(mlm_logits.cpu(), noised.cpu(), rtd_logits.cpu(), clm_logits.cpu())


def sample_softmax(logits: Tensor, noise: Tensor) -> Tensor:
    """One id per row [M] of softmax(logits [M, V]), by inverting its distribution at noise [M] in [0, 1)."""
    cumulated = logits.double().softmax(-1).cumsum(-1)
    places = torch.searchsorted(cumulated, (noise * cumulated[:, -1])[:, None], right=True)
    return places.squeeze(-1).clamp(max=logits.size(-1) - 1)


def evaluate(
    model: MetroForPreTraining,
    text: TokenizedDocuments,
    token_counts: NDArray[np.int64],
    batch_size: int,
    seed: int,
    on_progress: Callable[[int, int], object],
) -> dict[str, float]:
    """Every figure, in nats and shares, over all of `text` cut to the model's longest sample.

    token_counts [V] are those of the training text, for the unigram figures. Rates and detection are over all real
    tokens, <s> and </s> included, as in pretraining. `on_progress` gets batches done and batches in all.
    """
    index = build_sample_index([text], model.config.max_position_embeddings)
    by_length = np.argsort(index.length, kind="stable")
    batches = [by_length[at : at + batch_size] for at in range(0, len(index), batch_size)]
    model.eval()
    sums = _Sums()
    for done, ids in enumerate(batches, start=1):
        batch = masked_samples(text, index, ids, seed)
        sums.add(batch, guess(model, batch))
        on_progress(done, len(batches))
    return {
        **sums.figures(),
        **unigram_figures(torch.cat(sums.targets).numpy(), token_counts),
        "num_samples": len(index),
    }


class _Sums:
    def __init__(self) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64)
        """MLM loss and hits, CLM loss and hits, over masked positions."""
        self.targets: list[Tensor] = []
        self.rtd_logits: list[Tensor] = []
        self.is_replaced: list[Tensor] = []

    def add(self, batch: MaskedSamples, guesses: Guesses) -> None:
        targets = batch.ids[batch.is_masked]
        self.totals += torch.tensor(
            [
                value
                for logits in (guesses.mlm_logits, guesses.clm_logits)
                for value in (
                    functional.cross_entropy(logits.double(), targets, reduction="sum").item(),
                    float((logits.argmax(-1) == targets).sum()),
                )
            ],
            dtype=torch.float64,
        )
        self.targets.append(targets)
        self.rtd_logits.append(guesses.rtd_logits[batch.is_real])
        self.is_replaced.append((guesses.noised != batch.ids)[batch.is_real])

    def figures(self) -> dict[str, float]:
        num_masked = sum(len(part) for part in self.targets)
        mlm_loss, mlm_accuracy, clm_loss, clm_accuracy = (self.totals / max(num_masked, 1)).tolist()
        return {
            "mlm_loss": mlm_loss,
            "mlm_accuracy": mlm_accuracy,
            "clm_loss": clm_loss,
            "clm_accuracy": clm_accuracy,
            **detection_figures(torch.cat(self.rtd_logits).numpy(), torch.cat(self.is_replaced).numpy()),
            "num_masked": num_masked,
        }


def detection_figures(logits: NDArray[np.floating], is_replaced: NDArray[np.bool_]) -> dict[str, float]:
    """Replaced token detection [T]: loss, the loss of always saying the replace rate, AUC, hits of both kinds.

    A token is called replaced when its logit is below 0.
    """
    signed = np.where(is_replaced, logits, -logits).astype(np.float64)
    rate = float(is_replaced.mean())
    replaced, original = int(is_replaced.sum()), int((~is_replaced).sum())
    found, kept = int((is_replaced & (logits < 0)).sum()), int((~is_replaced & (logits >= 0)).sum())
    return {
        "rtd_loss": float(np.logaddexp(0.0, signed).mean()),
        "rtd_trivial_loss": -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0),
        "rtd_auc": area_under_curve(logits[~is_replaced], logits[is_replaced]),
        "replace_rate": rate,
        "replace_accuracy": found / max(replaced, 1),
        "non_replace_accuracy": kept / max(original, 1),
        "num_tokens": len(logits),
    }


def area_under_curve(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> float:
    """P(a positive score > a negative one), ties counted half; exact, by ranks. 1/2 where one class is empty."""
    if not len(positive) or not len(negative):
        return 0.5
    ascending = np.sort(negative)
    below = np.searchsorted(ascending, positive, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(ascending, positive, side="right").sum(dtype=np.int64)
    return float(below + not_above) / (2.0 * len(positive) * len(negative))


def unigram_figures(targets: NDArray[np.int64], token_counts: NDArray[np.int64]) -> dict[str, float]:
    """What token frequencies [V] of the training text, one added to each, give at the masked tokens [M]."""
    counts = token_counts.astype(np.float64) + 1
    log_probabilities = np.log(counts) - math.log(counts.sum())
    return {
        "unigram_loss": float(-log_probabilities[targets].mean()),
        "unigram_accuracy": float((targets == counts.argmax()).mean()),
    }
