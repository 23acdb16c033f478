"""Which token an id is, in the folder of any tokenizer of transformers."""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from metro_megatron.errors import UserError
from metro_megatron.tokenizer.tokenizer import WORD_BOUNDARY


def tokens_of(folder: Path, vocab_size: int) -> list[str | None]:
    """Tokens of ids 0 to vocab_size - 1, None where there is none. Raises UserError for a folder without a tokenizer.

    tokenizer.json says it by itself; where there is none, a class of transformers must know the folder's other files.
    A space is written as SentencePiece does: our own tokenizer.json has had one or the other.
    """
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            tokenizer = Tokenizer.from_file(str(path))
            tokens = [tokenizer.id_to_token(number) for number in range(vocab_size)]
            return [token and token.replace(" ", WORD_BOUNDARY) for token in tokens]
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return list(found.convert_ids_to_tokens(list(range(vocab_size))))
    except Exception as error:  # tokenizers raises plain ones
        short = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its tokenizer cannot be read ({short}); put it beside the model") from error


def other_ids(name: str, theirs: Path, ours: Path, vocab_size: int) -> list[str]:
    """What keeps a model with the tokenizer of one folder from a run with that of another: the first id that differs.

    name: the option and its value, which begin the sentence.
    """
    try:
        their_tokens, our_tokens = tokens_of(theirs, vocab_size), tokens_of(ours, vocab_size)
    except UserError as error:
        return [f"{name}: {problem}" for problem in error.problems]
    for number, (their, our) in enumerate(zip(their_tokens, our_tokens, strict=True)):
        if their != our:
            remedy = "give a model that was trained with the run's tokenizer, or preprocess with the model's"
            return [f"{name} has another tokenizer: id {number} is {their!r} there and {our!r} in the run's; {remedy}"]
    return []
