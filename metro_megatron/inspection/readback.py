"""Documents, samples and batches back as text. n tokens of a sample, <s> and </s> included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.manifest import DatasetPaths
from metro_megatron.data.samples import SampleIndex, SampleRule, sample_blocks
from metro_megatron.data.shards import Shard
from metro_megatron.errors import UserError
from metro_megatron.preprocess.parts import Part
from metro_megatron.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from metro_megatron.data.batch import MicroBatch, StepBatch


class TokenText:
    """Ids as text that shows where tokens are masked, and where a special stands."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._space = tokenizer.encode(" ")[:1]

    def plain(self, ids: Sequence[int]) -> str:
        """Text of ids without specials; what a terminal would obey is escaped."""
        return visible(self._decode(ids))

    def marked(self, ids: NDArray[np.integer], is_masked: NDArray[np.bool_]) -> str:
        """Text of a sample [n], the masked tokens in brackets: `<s> a long [ film] </s>` has `film` masked."""
        text = ""
        for kind, group in groupby(zip(ids.tolist(), is_masked.tolist(), strict=True), self._kind):
            tokens = [token for token, _ in group]
            if kind == "masked":
                text += "".join(f"[{self._inside([token])}]" for token in tokens)
            else:
                text += self._inside(tokens) if kind == "text" else "".join(map(self._tokenizer.token, tokens))
        return text

    def _kind(self, token: tuple[int, bool]) -> str:
        if token[1]:
            return "masked"
        return "special" if token[0] in self._tokenizer.special_ids.all else "text"

    def _inside(self, ids: Sequence[int]) -> str:
        """Text of ids that follow others: the space before the first word stays."""
        return visible(self._decode([*self._space, *ids]))

    def _decode(self, ids: Sequence[int]) -> str:
        wrong = [i for i in ids if not 0 <= i < self._tokenizer.vocab_size]
        if wrong:
            raise UserError(
                f"id {wrong[0]} is not one of the {self._tokenizer.vocab_size:,} of {self._tokenizer.path}; "
                "see what is damaged with --verify"
            )
        return self._tokenizer.decode(ids)


def visible(text: str) -> str:
    """`text` with escapes such as \\x1b for all that is not printable."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


@dataclass(frozen=True)
class Document:
    """A document, read."""

    number: int
    """In the dataset."""
    source: str
    shard: Shard
    first_token: int
    """In the shard."""
    content: TokenizedDocuments
    """This one alone."""

    def describe(self, text: TokenText) -> str:
        """Where it is, and its text: a line for each unit."""
        tokens, lengths = self.content.tokens, self.content.unit_lengths
        head = f"{_origin(self)}, {len(lengths):,} units, {len(tokens):,} tokens"
        units = np.split(tokens, np.cumsum(lengths)[:-1])
        return "\n".join([head, *(f"  {text.plain(unit.tolist())}" for unit in units)])

    def samples(self, seq_length: int) -> list[NDArray[np.int64]]:
        """Its samples, with <s> and </s>."""
        tokens, special_ids = self.content.tokens, self.shard.special_ids
        return [
            np.concatenate([[special_ids.bos], tokens[start : start + length], [special_ids.eos]])
            for block in sample_blocks([self.content], SampleRule(seq_length))
            for start, length in zip(block.start.tolist(), block.length.tolist(), strict=True)
        ]


def _origin(document: Document) -> str:
    where = f"{document.shard.prefix} from token {document.first_token:,}"
    return f"document {document.number:,} of {document.source}, {where}"


class DatasetReader:
    """Single documents of a dataset, by number.

    Raises UserError as Shard.open_all and Tokenizer.from_folder.
    """

    def __init__(self, prefix: str):
        self._prefix = prefix
        self._shards = Shard.open_all(prefix)
        self.text = TokenText(Tokenizer.from_folder(DatasetPaths(prefix).tokenizer))

    def __len__(self) -> int:
        return self._shards[0].manifest.documents

    def __getitem__(self, number: int) -> Document:
        manifest = self._shards[0].manifest
        starts = [shard.first_document for shard in self._shards]
        shard = self._shards[int(np.searchsorted(starts, number, side="right")) - 1]
        inside = number - shard.first_document
        block = next(Part.of_dataset(self._prefix, manifest, shard.number).from_document(inside, inside + 1).blocks())
        tokens = shard.tokens[block.first_token : block.first_token + int(block.token_starts[-1])]
        source = manifest.sources[manifest.source_of(number)].name
        content = TokenizedDocuments(tokens, block.unit_lengths, block.unit_starts)
        return Document(number, source, shard, block.first_token, content)

    def numbers(self, count: int, shuffle_seed: int) -> Iterator[int]:
        """The first `count` documents, or as many at random, ascending, if shuffle_seed is not 0."""
        count = min(count, len(self))
        if not shuffle_seed:
            return iter(range(count))
        chosen = np.random.default_rng(shuffle_seed).choice(len(self), count, replace=False, shuffle=False)
        return iter(np.sort(chosen).tolist())

    def samples(self, count: int, seq_length: int, shuffle_seed: int) -> Iterator[str]:
        """The first `count` samples; or one, chosen at random, of each of `count` documents chosen at random."""
        generator = np.random.default_rng(shuffle_seed)
        for number in self.numbers(count, shuffle_seed):
            document = self[number]
            samples = document.samples(seq_length)
            chosen = [int(generator.integers(len(samples)))] if shuffle_seed else range(min(count, len(samples)))
            for index in chosen:
                ids = samples[index]
                head = f"{_origin(document)}, sample {index + 1} of {len(samples)}, {len(ids)} tokens"
                yield f"{head}\n  {self.text.marked(ids, np.zeros(len(ids), np.bool_))}"
                count -= 1
            if not count:
                return


def describe_step(batch: StepBatch, index: SampleIndex, shards: Sequence[Shard], text: TokenText) -> Iterator[str]:
    """A head, then every sample of a step in the order of the rows: where it is, and its text with masks shown."""
    positions = sum(micro_batch.tokens.numel() for micro_batch in batch.micro_batches)
    count = sum(int((micro_batch.sample_ids >= 0).sum()) for micro_batch in batch.micro_batches)
    yield (
        f"{count:,} samples, {batch.num_tokens:,} tokens, {batch.num_masked:,} masked, in "
        f"{len(batch.micro_batches):,} micro batches of {positions // len(batch.micro_batches):,} places: "
        f"{1 - batch.num_tokens / positions:.2%} padding"
    )
    for number, micro_batch in enumerate(batch.micro_batches):
        for sample, ids, is_masked in samples_of(micro_batch):
            shard = shards[index.shard[sample]]
            origin = f"{shard.prefix} from token {index.start[sample]:,}"
            head = f"micro batch {number}, sample {sample:,}, {origin}, {len(ids)} tokens, {is_masked.sum()} masked"
            yield f"{head}\n  {text.marked(ids, is_masked)}"


def samples_of(micro_batch: MicroBatch) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.bool_]]]:
    """(sample id, original ids [n], which are masked [n]) of every sample, row by row, left to right."""
    lengths = micro_batch.sample_lengths.tolist()
    is_real = micro_batch.is_real
    tokens = micro_batch.tokens[is_real].numpy()
    is_masked = micro_batch.is_masked[is_real].numpy()
    ends = np.cumsum(lengths)
    for sample, begin, end in zip(micro_batch.sample_ids.tolist(), ends - lengths, ends, strict=True):
        if sample >= 0:
            yield sample, tokens[begin:end], is_masked[begin:end]
