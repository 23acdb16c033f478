"""Small random encoders of other architectures, each with its own kind of tokenizer, trained on a few sentences."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEXTS = (
    "The cat's house (1895-1943) was old; a dog, a bird & the river were green.",
    "Zoë naïvely likes 東京 in the summer – she finds it “good”, he does not.",
    "it was bad because the man did not see the old dog, so it was good",
)
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "pad_token_id": 0,
}
POSITIONS = 128


def wordpiece() -> Tokenizer:
    """BERT's: lower case, words cut at punctuation, pieces behind ##."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=list(SPECIALS), show_progress=False)
    return _trained(found, trainer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")


def byte_level() -> Tokenizer:
    """ModernBERT's: bytes, the space before a word belongs to it."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    return _trained(found, trainer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")


def unigram() -> Tokenizer:
    """DeBERTa-V3's: pieces of text with a mark before each word."""
    found = Tokenizer(models.Unigram())
    found.normalizer = normalizers.NFKC()
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=list(SPECIALS), unk_token="[UNK]", show_progress=False
    )
    return _trained(found, trainer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")


KINDS = {"bert": wordpiece, "modernbert": byte_level, "deberta-v2": unigram}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", *(["token_type_ids"] if kind != "modernbert" else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](),
        mask_token="[MASK]",
        model_input_names=inputs,
        model_max_length=POSITIONS,
        **names,
    )


def write_encoder(kind: str, folder: Path) -> Path:
    """A folder of random weights and its tokenizer."""
    tokenizer = tokenizer_of(kind)
    more = {"bert": {}, "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}}
    config = transformers.CONFIG_MAPPING[kind](
        **SIZES, vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, **more.get(kind, {})
    )
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _trained(found: Tokenizer, trainer: trainers.Trainer, single: str, pair: str) -> Tokenizer:
    found.train_from_iterator([text for text in TEXTS for _ in range(20)], trainer)
    ids = [(name, found.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    found.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return found
