"""Every choice of a task's maker is a hash of texts, so that it depends on no order and on no other choice."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

TEST_SHARE = 1 / 3

Item = TypeVar("Item")


def text_hash(*words: str) -> int:
    """64 bits of SHA-256 of words."""
    return int.from_bytes(hashlib.sha256("\0".join(words).encode()).digest()[:8])


def is_test(group: str) -> bool:
    """The side of a headword or document, the same in all tasks."""
    return text_hash("side", group) < TEST_SHARE * 2**64


def chosen(options: Sequence[Item], *words: str) -> Item:
    """One of the options."""
    return options[text_hash(*words) % len(options)]


def shuffled(items: Iterable[Item], group: Callable[[Item], str], purpose: str) -> list[Item]:
    """The items in the order of their groups' hashes; those of one group in their own order."""
    return sorted(items, key=lambda item: text_hash(purpose, group(item)))
