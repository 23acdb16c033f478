"""The equal tokenizer.json: a SentencePiece model as a `tokenizers` pipeline, for AutoTokenizer.

The conversion relies on three settings of the model: identity normalization, no whitespace removal, byte
fallback. `check_equal` shows the equality on given text.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from metro_megatron.errors import UserError
from metro_megatron.tokenizer.tokenizer import MODEL_FILE, TOKENIZER_FILES, WORD_BOUNDARY, Tokenizer
from metro_megatron.tokenizer.trained import check_model
from metro_megatron.vocabulary import BOS_ID, EOS_ID, NUM_SPECIALS, SPECIAL_TOKENS

MODEL_MAX_LENGTH = 512

_CHECK_BLOCK = 1024


def write_folder(model: bytes, folder: Path) -> None:
    """Write the three files of a tokenizer folder for a SentencePiece model."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    problems = check_model(processor)
    if problems:
        raise UserError(problems)
    (folder / MODEL_FILE).write_bytes(model)
    convert(processor).save(str(folder / TOKENIZER_FILES[1]))
    (folder / TOKENIZER_FILES[2]).write_text(json.dumps(tokenizer_config(), indent=2) + "\n", encoding="utf-8")


def convert(processor: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The `tokenizers` pipeline with SentencePiece's ids; `<s> A </s>`, for pairs `<s> A </s> </s> B </s>`.

    Unlike SentencePiece it recognizes added tokens in text, wherever they stand; what follows one without a space is
    segmented as inside a word. `<mask>` stands for a word with its space: it swallows the space before it. Tokens
    begin with a space where SentencePiece's pieces have U+2581, as only white space is cut off offsets.
    """
    pieces = [processor.id_to_piece(i).replace(WORD_BOUNDARY, " ") for i in range(processor.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, _merges(processor, vocabulary), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    # The space before a text is the pre-tokenizer's, which adds none to a text that begins with one. It must not be
    # the normalizer's, through which the strings of added tokens go.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(WORD_BOUNDARY, " "), normalizers.Replace(Regex(r"\A(?= )"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=True)
    ends = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", BOS_ID), ("</s>", EOS_ID)],
    )
    # What cuts off offsets: that of byte-level BPE does no more than that. The first space is not the text's.
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(add_prefix_space=True), ends])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS[:-1]])
    tokenizer.add_special_tokens([AddedToken(SPECIAL_TOKENS[-1], normalized=True, lstrip=True)])
    return tokenizer


def check_equal(folder: Path, texts: Sequence[str]) -> None:
    """Raise UserError unless SentencePiece, tokenizer.json and `Tokenizer` give equal ids.

    Compared on the texts without special tokens, which only tokenizer.json recognizes in text.
    """
    texts = [text for text in texts if not any(token in text for token in SPECIAL_TOKENS)]
    expected = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL_FILE)).encode(texts)
    fast = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILES[1]))
    _refuse_difference(texts, expected, Tokenizer.from_folder(folder).encode_batch(texts), "Tokenizer")
    for start in range(0, len(texts), _CHECK_BLOCK):
        block = slice(start, start + _CHECK_BLOCK)
        found = [encoding.ids for encoding in fast.encode_batch_fast(texts[block], add_special_tokens=False)]
        _refuse_difference(texts[block], expected[block], found, "tokenizer.json")


def _refuse_difference(texts: Sequence[str], expected: list[list[int]], found: list[list[int]], name: str) -> None:
    for text, these, those in zip(texts, expected, found, strict=True):
        if these != those:
            raise UserError(
                f"{name} gives {those[:20]}, SentencePiece {these[:20]} for {text[:80]!r}; nothing was "
                "written. Another --vocab_size or --sample_bytes gives other merges"
            )


def _merges(processor: sentencepiece.SentencePieceProcessor, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first, as SentencePiece would."""
    normal = {p: i for p, i in vocabulary.items() if i >= NUM_SPECIALS and not processor.is_byte(i)}
    ranked = [
        (-processor.get_score(i), normal[piece[:k]], normal[piece[k:]], piece[:k], piece[k:])
        for piece, i in normal.items()
        for k in range(1, len(piece))
        if piece[:k] in normal and piece[k:] in normal
    ]
    return [(left, right) for _, _, _, left, right in sorted(ranked)]


def tokenizer_config() -> dict[str, object]:
    """What tokenizer_config.json says, so that any Auto class makes the tokenizer of tokenizer.json itself."""
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": True, "single_word": False}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MODEL_MAX_LENGTH,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": {"__type": "AddedToken", "special": True, **mask},
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
