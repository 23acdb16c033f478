"""Small tokenizers as BERT, RoBERTa and DeBERTa-V3 have them: other kinds, and special ids elsewhere than ours."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

KINDS = ("wordpiece", "bytes", "unigram")


def write_other(kind: str, texts: Iterable[str], folder: Path) -> tokenizers.Tokenizer:
    """Train one of KINDS and save its tokenizer.json in a folder, which is returned by itself."""
    tokenizer = {"wordpiece": _wordpiece, "bytes": _byte_level, "unigram": _unigram}[kind](list(texts))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def _wordpiece(texts: list[str]) -> tokenizers.Tokenizer:
    """BERT's: [PAD] is id 0, then 99 unused ones, [UNK], [CLS], [SEP] and [MASK] are 100 to 103."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    unused = [f"[unused{number}]" for number in range(99)]
    specials = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Unused ones are ordinary rows of BERT's vocabulary, no added tokens.
    kept = tokenizers.Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))
    kept.normalizer, kept.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    kept.decoder = tokenizer.decoder
    kept.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    kept.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    return kept


def _byte_level(texts: list[str]) -> tokenizers.Tokenizer:
    """RoBERTa's: <s>, <pad>, </s>, <unk> first and <mask> last, and no text that is unknown."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.add_tokens(["metroword"])
    return tokenizer


def _unigram(texts: list[str]) -> tokenizers.Tokenizer:
    """DeBERTa-V3's: [PAD], [CLS], [SEP], [UNK] first and [MASK] last."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token="[UNK]", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["[MASK]"])
    return tokenizer
