"""How well an exported model does on unseen text what it was pretrained for: a pair fills, detects and corrects.

Masks and replacements are functions of (seed, sample, position), so a figure does not depend on the batch size.
Legend: n samples, S positions, T tokens without padding, M masked positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metro_megatron.config.schema import Config, CorruptionConfig, ObjectiveConfig
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.masking import Cells, Masking
from metro_megatron.data.order import Draws
from metro_megatron.data.samples import SampleIndex, build_sample_index
from metro_megatron.errors import UserError
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.export import model_config_of
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.objective.cloze import OneChoiceCloze
from metro_megatron.objective.figures import COUNTS, figures
from metro_megatron.objective.term import Sums, Term
from metro_megatron.objective.terms import exported_terms
from metro_megatron.randomness import Purpose, uniform
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.vocabulary import TRAINED_IDS, SpecialIds

DISTRACTORS = OneChoiceCloze.num_distractors
OF_ROWS = ("tokens", "non_pad_fraction")
"""Figures of training that tell of batches, not of the pair."""


@dataclass(frozen=True)
class MaskedSamples:
    """A batch before any model has seen it."""

    ids: Tensor
    """[n, S] original tokens with <s>, </s> and padding on the right."""
    is_masked: Tensor
    """[n, S]"""
    noise: Tensor
    """[M, 1 + DISTRACTORS] float64 uniform numbers in the order of is_masked's rows: the first ones draw the
    replacements, the others what one-choice cloze offers beside the originals."""

    special_ids: SpecialIds = TRAINED_IDS

    @property
    def is_real(self) -> Tensor:
        """[n, S] where there are tokens, specials included."""
        return self.ids != self.special_ids.pad


@dataclass(frozen=True)
class Guesses:
    """What the model makes of a batch; logits on the CPU."""

    noised: Tensor
    """[n, S] ids that main read: at the masked positions samples, or <mask> where it is a masked language model."""
    logits: dict[str, Tensor]
    """What each term's head says, by the term's name: [M, V] of language models, [M, 1 + DISTRACTORS] of one-choice
    cloze, the original first, else [n, S]."""


def held_out_text(documents: Iterable[Sequence[str]], tokenizer: Tokenizer) -> TokenizedDocuments:
    """Encode documents, each a sequence of units. Raises UserError if there is no text in them."""
    text = TokenizedDocuments.from_units(map(tokenizer.encode_batch, documents))
    if not len(text.tokens):
        raise UserError("the input holds no text to evaluate on")
    return text


def masked_samples(
    text: TokenizedDocuments,
    index: SampleIndex,
    ids: NDArray[np.int64],
    seed: int,
    special_ids: SpecialIds = TRAINED_IDS,
    mask_probability: float = 0.15,
) -> MaskedSamples:
    """The samples with numbers `ids` of `index`, masked as in pretraining."""
    lengths = index.length[ids]
    draws = Draws(np.zeros_like(ids), ids)
    tokens = np.full((len(ids), int(lengths.max()) + 2), special_ids.pad, dtype=np.int64)
    tokens[:, 0] = special_ids.bos
    for number, (start, length) in enumerate(zip(index.start[ids], lengths, strict=True)):
        tokens[number, 1 : length + 1] = text.tokens[start : start + length]
        tokens[number, length + 1] = special_ids.eos
    begins = np.arange(len(ids)) * tokens.shape[1]
    masking = Masking(seed, mask_probability, special_ids=special_ids)
    row, position = masking.positions(draws, lengths, Cells(tokens.ravel(), begins))
    is_masked = np.zeros_like(tokens, dtype=bool)
    is_masked[row, position] = True
    words = seed, Purpose.SAMPLE, ids[row], position
    noise = np.stack([uniform(*words), *(uniform(*words, draw) for draw in range(1, DISTRACTORS + 1))], axis=1)
    return MaskedSamples(torch.from_numpy(tokens), torch.from_numpy(is_masked), torch.from_numpy(noise), special_ids)


@torch.no_grad()
def guess(model: MetroForPreTraining, batch: MaskedSamples) -> Guesses:
    """Fill the masks as `filling` says, sampling a softmax, and let the main model judge."""
    moved = (x.to(model.device) for x in (batch.ids, batch.is_masked, batch.is_real, batch.noise))
    ids, is_masked, attention_mask, noise = moved
    terms, kind = terms_of(model.config), filling(model.config)
    noised, logits = ids.masked_fill(is_masked, batch.special_ids.mask), {}
    if kind == "auxiliary":
        auxiliary = model.encode_auxiliary(noised, attention_mask)
        filler = terms.pop(0)
        logits[filler.name] = distribution = filler.exported_logits(model, auxiliary, is_masked)
    elif kind == "uniform":
        distribution = torch.zeros(len(noise), model.config.vocab_size, device=model.device)
    if kind != "none":
        specials = torch.tensor(batch.special_ids.all, device=model.device)
        distribution = distribution.index_fill(1, specials, -math.inf)
        noised = ids.masked_scatter(is_masked, sample_softmax(distribution, noise[:, 0]))
    hidden = model.metro(noised, attention_mask).last_hidden_state
    logits |= {term.name: term.exported_logits(model, hidden, is_masked) for term in terms}
    if OneChoiceCloze.name in logits:
        candidates = offered(distribution, ids[is_masked], noised[is_masked], noise[:, 1:])
        logits[OneChoiceCloze.name] = logits[OneChoiceCloze.name].gather(1, candidates)
    return Guesses(noised.cpu(), {name: one.cpu() for name, one in logits.items()})


def terms_of(config: MetroConfig) -> list[Term]:
    """The losses whose heads an exported model has: the auxiliary model's first."""
    corruption = CorruptionConfig(source="auxiliary" if config.num_auxiliary_layers else "none")
    objective = ObjectiveConfig(main=list(config.objectives))  # type: ignore[arg-type]
    return exported_terms(Config(objective=objective, corruption=corruption, model=model_config_of(config)))


def filling(config: MetroConfig) -> Literal["auxiliary", "none", "uniform"]:
    """What stands at the masked positions when main reads: the auxiliary's samples; <mask>, for a masked language
    model; or, as an export without auxiliary does not hold what it was pretrained against, any ids with equal chance.
    """
    if config.num_auxiliary_layers:
        return "auxiliary"
    return "none" if "mlm" in config.objectives else "uniform"


def offered(logits: Tensor, originals: Tensor, sampled: Tensor, noise: Tensor) -> Tensor:
    """[M, 1 + C] originals [M], and by noise [M, C] as many other ids, drawn without putting back.

    As in training, a sample [M] that is not the original is the first of the others.
    """
    found = originals[:, None]
    for number, column in enumerate(noise.unbind(1)):
        drawn = sample_softmax(logits.scatter(1, found, -math.inf), column)
        if number == 0:
            drawn = torch.where(sampled == originals, drawn, sampled)
        found = torch.cat([found, drawn[:, None]], dim=1)
    return found


def sample_softmax(logits: Tensor, noise: Tensor) -> Tensor:
    """One id per row [M] of softmax(logits [M, V]), by inverting its distribution at noise [M] in [0, 1)."""
    cumulated = logits.double().softmax(-1).cumsum(-1)
    ids = torch.searchsorted(cumulated, (noise * cumulated[:, -1])[:, None], right=True)
    return ids.squeeze(-1).clamp(max=logits.size(-1) - 1)


def evaluate(
    model: MetroForPreTraining,
    text: TokenizedDocuments,
    token_counts: NDArray[np.int64],
    batch_size: int,
    seed: int,
    on_progress: Callable[[int, int], object],
    of_samples: dict[int, Sums] | None = None,
) -> dict[str, float]:
    """Every figure, in nats and shares, over all of `text` cut to the model's longest sample.

    token_counts [V] are those of the training text, for the unigram figures. Rates and detection are over all real
    tokens, <s> and </s> included, as in pretraining. `on_progress` gets batches done and batches in all. `of_samples`,
    if given, gets the sums of every sample by its number, which document_figures reads.
    """
    index = build_sample_index([text], model.config.max_position_embeddings)
    by_length = np.argsort(index.length, kind="stable")
    batches = [by_length[at : at + batch_size] for at in range(0, len(index), batch_size)]
    model.eval()
    special_ids = model_config_of(model.config).special_ids
    terms, sums, targets = terms_of(model.config), {name: torch.zeros(size) for name, size in COUNTS.items()}, []
    for done, ids in enumerate(batches, start=1):
        batch = masked_samples(text, index, ids, seed, special_ids, model.config.mask_probability)
        guesses = guess(model, batch)
        for name, value in (_scalars(terms, batch, guesses) | _histograms(terms, batch, guesses)).items():
            sums[name] = sums.get(name, 0) + value.double()
        if of_samples is not None:
            of_samples |= {int(ids[row]): _scalars(terms, *_row(batch, guesses, row)) for row in range(len(ids))}
        targets.append(batch.ids[batch.is_masked])
        on_progress(done, len(batches))
    found = figures(terms, sums)
    return {
        **{name: value for name, value in found.items() if name not in OF_ROWS},
        **({"rtd_trivial_loss": _entropy(found["replace_rate"])} if "rtd_loss" in found else {}),
        **unigram_figures(torch.cat(targets).numpy(), token_counts),
        "num_masked": int(sums["num_masked"]),
        "num_tokens": int(sums["num_tokens"]),
        "num_samples": len(index),
    }


def document_figures(
    config: MetroConfig, text: TokenizedDocuments, of_samples: dict[int, Sums]
) -> list[dict[str, float]]:
    """The figures of each document by itself, from what `evaluate` noted of its samples; a document of no samples has
    none. Left out is a figure that it cannot have, such as a loss where no token is masked, and the area under the
    curve, which no mean over documents gives."""
    index = build_sample_index([text], config.max_position_embeddings)
    ends = np.concatenate([[0], text.unit_lengths.cumsum()])[text.document_index]
    owner = np.searchsorted(ends, index.start, side="right") - 1
    sums: list[dict[str, Tensor]] = [{} for _ in range(text.num_documents)]
    for sample, document in enumerate(owner.tolist()):
        for name, value in of_samples[sample].items():
            sums[document][name] = sums[document].get(name, torch.zeros(())) + value.double()
    terms = terms_of(config)
    nothing = {name: torch.zeros(1) for term in terms for name, elements in term.sums.items() if elements > 1}
    return [_known_figures(terms, one | nothing) if one else {} for one in sums]


def _known_figures(terms: Sequence[Term], sums: Sums) -> dict[str, float]:
    """Of losses and shares, those that are not over nothing."""
    masked, tokens, replaced = (int(sums[name]) for name in ("num_masked", "num_tokens", "replaced"))
    over = {"replace_accuracy": replaced, "non_replace_accuracy": tokens - replaced}
    over["rtd_auc"] = 0
    found = figures(terms, sums)
    kept = {name for name in found if name not in OF_ROWS and over.get(name, tokens if "rtd" in name else masked)}
    return {name: value for name, value in found.items() if name in kept and math.isfinite(value)}


def _row(batch: MaskedSamples, guesses: Guesses, row: int) -> tuple[MaskedSamples, Guesses]:
    """One sample of a batch by itself."""
    before, here = (int(batch.is_masked[rows].sum()) for rows in (slice(row), row))
    masked, whole = slice(before, before + here), slice(row, row + 1)
    num_samples = len(batch.ids)
    logits = {
        name: one[whole] if one.shape[:2] == (num_samples, batch.ids.shape[1]) else one[masked]
        for name, one in guesses.logits.items()
    }
    sample = replace(batch, ids=batch.ids[whole], is_masked=batch.is_masked[whole], noise=batch.noise[masked])
    return sample, Guesses(guesses.noised[whole], logits)


def _scalars(terms: Sequence[Term], batch: MaskedSamples, guesses: Guesses) -> Sums:
    """COUNTS, and every term's sums."""
    is_replaced = (guesses.noised != batch.ids) & batch.is_real
    sums = {
        "num_masked": batch.is_masked.sum(),
        "num_tokens": batch.is_real.sum(),
        "num_places": torch.tensor(batch.ids.numel()),
        "replaced": is_replaced.sum(),
    }
    for term in terms:
        sums |= term.exported_sums(guesses.logits[term.name], guesses.noised, batch.ids, batch.is_masked)
    return sums


def _histograms(terms: Sequence[Term], batch: MaskedSamples, guesses: Guesses) -> Sums:
    found: Sums = {}
    for term in terms:
        found |= term.exported_histograms(guesses.logits[term.name], guesses.noised, batch.ids)
    return found


def _entropy(rate: float) -> float:
    """Nats of a coin: the detection loss of always saying the rate."""
    return -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)


def unigram_figures(targets: NDArray[np.int64], token_counts: NDArray[np.int64]) -> dict[str, float]:
    """What token frequencies [V] of the training text, one added to each, give at the masked tokens [M]."""
    probabilities = unigram_probabilities(token_counts)
    return {
        "unigram_loss": float(-np.log(probabilities[targets]).mean()),
        "unigram_accuracy": float((targets == probabilities.argmax()).mean()),
    }


def unigram_probabilities(token_counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """What token frequencies [V], one added to each, expect anywhere."""
    counts = token_counts.astype(np.float64) + 1
    return counts / counts.sum()
