"""Whether datasets hold the same documents, whatever they are called and wherever they lie: told by hashes.

Two datasets share documents where they share a `.bin`, or where all that one was read from was read for the other,
too, as a merged dataset and its parts are, or a file and those that it was joined of. What was read is known by its
bytes, in the pieces in which it was read, and by keys of its texts. Such a key is the sum of 128-bit hashes of the
texts without their white space: the same for the same texts in any order, whatever kinds of files hold them, however
these were cut and compressed, and whatever was left out or made of them then.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from metro_megatron.data.manifest import Manifest
from metro_megatron.data.shards import Shard, open_shards
from metro_megatron.errors import UserError

_MOST_NAMED = 20
"""Pairs of datasets."""
_MOST_PAIRED = 1000
"""Keys of which every two are added: half a million sums, a tenth of a second."""
_SHOWN = 5
_KEY_BYTES = 16
_MODULUS = 1 << 8 * _KEY_BYTES
_NO_TEXTS = "0" * 2 * _KEY_BYTES
_WHITE = b" \t\n\r\v\f"


def open_datasets(train: Sequence[str], validation: Sequence[str] = ()) -> tuple[list[Shard], list[Shard]]:
    """The shards of the datasets of data.train, and of data.validation.

    Raises UserError as open_shards, and naming all datasets of which one has documents of another.
    """
    shards = open_shards([*train, *validation])
    firsts = [number for number, shard in enumerate(shards) if shard.number == 0]
    problems = []
    for one, other, reason in shared([shards[first].manifest for first in firsts]):
        names = [*train, *validation]
        if other < len(train):
            remedy = "name one of them, and give data.weights to read it more often"
            problems.append(f"data.train: {names[one]} and {names[other]} {reason}; {remedy}")
        elif one < len(train):
            problems.append(
                f"data.validation: {names[other]} and {names[one]} of data.train {reason}, so that what is trained on "
                "would be evaluated on; hold out other datasets, or set data.validation_fraction"
            )
        else:
            problems.append(f"data.validation: {names[one]} and {names[other]} {reason}; name one of them")
    if len(problems) > _MOST_NAMED:
        problems[_MOST_NAMED:] = [f"and so do {len(problems) - _MOST_NAMED:,} more pairs of datasets"]
    if problems:
        raise UserError(problems)
    num_train = firsts[len(train)] if validation else len(shards)
    return shards[:num_train], shards[num_train:]


def shared(datasets: Sequence[Manifest]) -> Iterator[tuple[int, int, str]]:
    """(number, later number, why) of each pair of datasets that share documents."""
    shards = [{shard.bin.sha256 for shard in manifest.shards} for manifest in datasets]
    all_texts = [_all_texts(manifest) for manifest in datasets]
    found: dict[tuple[int, int], str] = {}
    for sets, reason in (
        ([_texts(manifest) for manifest in datasets], "were made of the same texts"),
        ([{key} - {None, _NO_TEXTS} for key in all_texts], "were made of the same texts"),
        ([_inputs(manifest) for manifest in datasets], "were made of the same files"),
    ):
        for (one, other), count in _common(sets).items():
            if count in (len(sets[one]), len(sets[other])):
                found[one, other] = reason
    for whole, parts in repeated(all_texts):
        found |= {(min(part, whole), max(part, whole)): "were made of the same texts" for part in parts}
    for (one, other), count in _common(shards).items():
        is_whole = count == len(shards[one]) == len(shards[other])
        found[one, other] = "are the same dataset" if is_whole else f"have {count:,} shards in common"
    for (one, other), reason in sorted(found.items()):
        yield one, other, f"{reason} (by their hashes)"


class TextsKey:
    """The key of texts that come one after another."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, text: str) -> None:
        """Take one text."""
        content = text.encode().translate(None, _WHITE)
        self._sum += int.from_bytes(hashlib.sha256(content).digest()[:_KEY_BYTES])

    def __str__(self) -> str:
        return _key(self._sum)


def joined_keys(keys: Iterable[str | None]) -> str | None:
    """The key of all texts of these keys; None where one is not known."""
    known = list(keys)
    return None if None in known else _key(sum(int(key, 16) for key in known if key))


def repeated(keys: Sequence[str | None]) -> Iterator[tuple[int, list[int]]]:
    """(number, numbers of others) of each key that is another one, or the sum of two others or of all others.

    Of more than _MOST_PAIRED keys no two are added.
    """
    known = {number: int(key, 16) for number, key in enumerate(keys) if key not in (None, _NO_TEXTS)}
    first = {key: number for number, key in reversed(known.items())}
    total = sum(known.values())
    for number, key in known.items():
        if first[key] != number:
            yield number, [first[key]]
        elif len(known) > 2 and (total - 2 * key) % _MODULUS == 0:
            yield number, [other for other in known if other != number]
    if 2 < len(known) <= _MOST_PAIRED:
        for (one, key), (other, second) in combinations(known.items(), 2):
            if (whole := first.get((key + second) % _MODULUS)) is not None:
                yield whole, [one, other]


def repeated_files(manifest: Manifest) -> list[str]:
    """A line for each input file of a dataset whose texts are in others as well, in the order of the files."""
    files = [file for source in manifest.sources for file in source.files]
    found: dict[int, list[int]] = {}
    for number, others in repeated([file.texts for file in files]):
        found.setdefault(number, others)
    names = [file.name for file in files]
    return [
        f"{names[number]} has the texts of {', '.join(names[other] for other in others[:_SHOWN])}"
        + (f" and {len(others) - _SHOWN:,} more" if len(others) > _SHOWN else "")
        for number, others in sorted(found.items())
    ]


def _key(number: int) -> str:
    return f"{number % _MODULUS:0{2 * _KEY_BYTES}x}"


def _texts(manifest: Manifest) -> set[object]:
    """Keys of the files that a dataset was read from, of each one; what is not known is like nothing else."""
    keys = (file.texts for source in manifest.sources for file in source.files)
    return {object() if key is None else key for key in keys} - {_NO_TEXTS}


def _all_texts(manifest: Manifest) -> str | None:
    """The key of all that a dataset was read from, if it is known: cut into other files, texts are the same."""
    return joined_keys(file.texts for source in manifest.sources for file in source.files)


def _inputs(manifest: Manifest) -> set[tuple[tuple[str, ...], str]]:
    """What a dataset was read from: keys of its texts, and SHA-256 of each piece of a file.

    Pieces of other --chunk_bytes are others.
    """
    return {
        (source.options.text_keys, sha256)
        for source in manifest.sources
        for file in source.files
        for begin, end, sha256 in file.pieces
        if sha256 and end > begin
    }


def _common(sets: Sequence[set[Any]]) -> Counter[tuple[int, int]]:
    """How many elements each pair of sets has in common, pairs of none left out."""
    places = defaultdict(list)
    for number, elements in enumerate(sets):
        for element in elements:
            places[element].append(number)
    pairs: Counter[tuple[int, int]] = Counter()
    for numbers in places.values():
        pairs.update((one, other) for place, one in enumerate(numbers) for other in numbers[place + 1 :])
    return pairs
