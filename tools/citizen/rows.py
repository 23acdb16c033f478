"""Checks of rows: padding, packing, kinds of attention, formats of numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tools.citizen.subject import ORDER, Checks, Subject, close, equal, require


def alone(model: Any, subject: Subject) -> Tensor:
    """Hidden states of every text by itself, one after the other."""
    with torch.no_grad():
        return torch.cat([model(ids[None]).last_hidden_state[0] for ids in subject.samples()])


def padded(model: Any, subject: Subject, side: str) -> Tensor:
    """The same of one padded batch."""
    rows = subject.rows(side)
    with torch.no_grad():
        return model(**rows).last_hidden_state[rows["attention_mask"].bool()]


def packed_row(subject: Subject) -> dict[str, Tensor]:
    """All texts in one row, as `DataCollatorWithFlattening` makes it."""
    samples = subject.samples()
    ids, positions = torch.cat(samples), torch.cat([torch.arange(len(ids)) for ids in samples])
    return {"input_ids": ids[None], "position_ids": positions[None]}


def right_padding(subject: Subject) -> str:
    """Padding on the right changes nothing."""
    model = subject.load()
    return close(padded(model, subject, "right"), alone(model, subject))


def left_padding(subject: Subject) -> str:
    """Padding on the left is the same as on the right, bit by bit, hidden states and classes."""
    model, classifier = subject.load(), subject.classifier()
    with torch.no_grad():
        equal(classifier(**subject.rows("left")).logits, classifier(**subject.rows("right")).logits)
    return equal(padded(model, subject, "left"), padded(model, subject, "right"))


def empty_rows(subject: Subject) -> str:
    """A row that is all padding is finite in every format, and leaves the others alone."""
    rows = subject.rows()
    expected = subject.load()(**rows).last_hidden_state
    with_empty = {name: torch.cat([value, torch.zeros_like(value[:1])]) for name, value in rows.items()}
    for attention in ("sdpa", "eager"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            found = subject.load(attn_implementation=attention, dtype=dtype)(**with_empty).last_hidden_state
            require(bool(found.isfinite().all()), f"{attention} in {dtype} is not finite")
    return close(found[:-1], expected)


def packed(subject: Subject) -> str:
    """Texts in one row with position_ids are as each by itself."""
    model = subject.load()
    with torch.no_grad():
        return close(model(**packed_row(subject)).last_hidden_state[0], alone(model, subject))


def mask_of_pairs(subject: Subject) -> str:
    """A block-diagonal mask of transformers' two forms says the same as position_ids."""
    model, row = subject.load(), packed_row(subject)
    text = (row["position_ids"] == 0).cumsum(-1)
    sees = (text[:, :, None] == text[:, None, :])[:, None]
    added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(**row).last_hidden_state
        for mask in (sees[:, 0], sees, added):
            found = close(model(**row, attention_mask=mask).last_hidden_state, expected)
    return found


def attention_kinds(subject: Subject) -> str:
    """SDPA and eager."""
    rows = subject.rows()
    found = [subject.load(attn_implementation=kind)(**rows).last_hidden_state for kind in ("sdpa", "eager")]
    return close(found[0], found[1])


def formats(subject: Subject) -> str:
    """fp16 and bf16 are finite and near fp32, within their steps near 1 times the layers."""
    rows, apart = subject.rows(), []
    mask = rows["attention_mask"].bool()
    exact = subject.load()(**rows).last_hidden_state[mask]
    for dtype in (torch.float16, torch.bfloat16):
        model = subject.load(dtype=dtype)
        found = model(**rows).last_hidden_state[mask]
        require(found.dtype == dtype, f"gives {found.dtype}")
        size = float(exact.abs().max()) * torch.finfo(dtype).eps * 2 * model.config.num_hidden_layers
        apart.append(close(found.float(), exact, size))
    return "; ".join(apart)


def batch_invariance(subject: Subject) -> str:
    """A text says the same in a batch of 1 and of 24."""
    model, rows = subject.classifier(), subject.rows()
    many = {name: value.repeat(8, 1) for name, value in rows.items()}
    with torch.no_grad():
        one = torch.cat([model(**{name: value[i : i + 1] for name, value in rows.items()}).logits for i in range(3)])
        return close(model(**many).logits, one.repeat(8, 1), ORDER)


ROWS: Checks = {
    "padding on the right": right_padding,
    "padding on the left": left_padding,
    "rows of padding alone": empty_rows,
    "packed = padded = alone": packed,
    "masks of pairs": mask_of_pairs,
    "SDPA = eager": attention_kinds,
    "fp16, bf16, fp32": formats,
    "batch invariance": batch_invariance,
}
