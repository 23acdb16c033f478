"""The tokenizer a run uses: SentencePiece BPE with byte fallback, read from a tokenizer folder.

A folder holds `tokenizer.model` (SentencePiece), the equal `tokenizer.json` and `tokenizer_config.json` (for
`transformers.AutoTokenizer`). Ids here come from the `.model`, so they are SentencePiece's by construction:
text that spells a control string such as `<s>` stays text. `tokenizer_training` writes folders and shows the
`.json` equal before it does.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from metro_megatron.errors import UserError
from metro_megatron.files import remove_partial, write_whole
from metro_megatron.vocabulary import NUM_SPECIALS, SPECIAL_TOKENS

MODEL_FILE = "tokenizer.model"
TOKENIZER_FILES = (MODEL_FILE, "tokenizer.json", "tokenizer_config.json")

WORD_BOUNDARY = "\u2581"
"""SentencePiece's visible space."""

_MAX_CACHED_WORDS = 300_000
_MAX_CACHED_CHARACTERS = 48


class Tokenizer:
    """Exact SentencePiece ids, words remembered: the same word is segmented once.

    Remembering words is exact because no piece crosses a space (checked on loading): SentencePiece then
    segments every space-delimited word by itself.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, path: Path, sha256: str):
        self._processor = processor
        self._boundary_id: int = processor.piece_to_id(WORD_BOUNDARY)
        self._cache: dict[str, list[int]] = {}
        self.path = path
        self.sha256 = sha256
        self.vocab_size: int = processor.get_piece_size()

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Load a folder written by tools/train_tokenizer.py.

        Raises UserError if a file is missing, the model is unreadable or not one of ours.
        """
        folder = Path(path)
        missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"tokenizer folder {folder} lacks {', '.join(missing)}; write one with tools/train_tokenizer.py"
            )
        try:
            model = (folder / MODEL_FILE).read_bytes()
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder / MODEL_FILE} is not a readable SentencePiece model ({error})") from error
        problems = check_model(processor)
        if problems:
            raise UserError([f"{folder / MODEL_FILE}: {problem}" for problem in problems])
        return cls(processor, folder, hashlib.sha256(model).hexdigest())

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without `<s>` and `</s>`; none for the empty string."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, without `<s>` and `</s>`."""
        cache = self._cache
        batch = []
        for text in texts:
            ids: list[int] = []
            for word in text.split(" ") if text else ():
                found = cache.get(word)
                ids += self._encode_word(word) if found is None else found
            batch.append(ids)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; specials give nothing, except `<unk>`."""
        return self._processor.decode(list(map(int, ids)))

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = self._processor.encode(word) if word else [self._boundary_id]
        if len(self._cache) < _MAX_CACHED_WORDS and len(word) <= _MAX_CACHED_CHARACTERS:
            self._cache[word] = ids
        return ids


def check_model(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    """What keeps a SentencePiece model from being used here; nothing for those of our own tool."""
    size = processor.get_piece_size()
    pieces = [processor.id_to_piece(i) for i in range(size)]
    problems = []
    if tuple(pieces[:NUM_SPECIALS]) != SPECIAL_TOKENS:
        problems.append(f"ids 0 to 4 are {pieces[:NUM_SPECIALS]}, must be {list(SPECIAL_TOKENS)}")
    if sum(processor.is_byte(i) for i in range(size)) != 256:
        problems.append("has no byte fallback (256 byte pieces); train with --byte_fallback")
    if WORD_BOUNDARY not in pieces:
        problems.append("has no piece for a single space")
    crossing = [piece for piece in pieces if WORD_BOUNDARY in piece[1:]]
    if crossing:
        problems.append(f"pieces such as {crossing[0]!r} cross a space; train with split_by_whitespace")
    as_it_is = "\u00a0 \t ab\u200d\ufb01 "
    if not problems and processor.decode(processor.encode(as_it_is)) != as_it_is:
        problems.append("normalizes its input; train with identity normalization and remove_extra_whitespaces=false")
    return problems


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy the files of a tokenizer folder into folder `target`; each appears there whole or not at all."""
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    remove_partial(target)
    for name in TOKENIZER_FILES:
        write_whole(target / name, (Path(source) / name).read_bytes())
