"""Evaluate an exported pair on held-out text: fill, detect, correct."""

import json
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from metro_megatron.cli.command_line import run_tool
from metro_megatron.data.shards import open_shards
from metro_megatron.errors import UserError
from metro_megatron.evaluate.intrinsic import evaluate, held_out_text
from metro_megatron.evaluate.sentences import LEGEND, choose_sentences, show
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.text.documents import Reject, read_documents
from metro_megatron.text.inputs import find_inputs
from metro_megatron.tokenizer.tokenizer import Tokenizer


def main(
    model: str,
    input: list[str],
    output: str,
    unigram_from: str,
    batch_size: int = 32,
    sentences: int = 4,
    seed: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Evaluate an exported pair on text it has not seen, and print a few sentences filled and corrected.

    15% of the tokens are masked; the auxiliary model fills them by sampling; the main model says which tokens are
    not the original ones and what stood there. Equal input and seed give equal figures.

    Args:
        model: folder written by tools/convert_checkpoint.py
        input: held-out text: .jsonl (a JSON object with "text" per line) or .txt (blank lines between documents)
        output: JSON file to write
        unigram_from: prefix of the training shard whose token frequencies are the trivial model
        batch_size: samples per batch
        sentences: how many sentences are printed
        seed: seed of masks and samples
        device: auto takes a GPU where there is one
    """
    if batch_size < 1 or sentences < 0:
        raise UserError(f"--batch_size {batch_size} must be at least 1, --sentences {sentences} at least 0")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU; use auto or cpu")
    logging.disable_progress_bar()
    files = find_inputs(input)
    pair = load_pair(Path(model))
    counts = count_tokens(unigram_from, Path(model), pair.config.vocab_size)
    rejects: Counter[Reject] = Counter()
    documents = [document.units for document in read_documents(files, rejects)]
    text = held_out_text(documents, Tokenizer.from_folder(model))
    use_cuda = device != "cpu" and torch.cuda.is_available()
    pair.to("cuda" if use_cuda else "cpu")  # type: ignore[arg-type]  # transformers' decorator hides the types
    figures = evaluate(pair, text, counts, batch_size, seed, _print_progress)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**figures, "num_documents": len(documents)}, indent=2) + "\n", encoding="utf-8")
    print(describe(figures, len(documents), rejects.total()))
    print(LEGEND)
    for shown in show(pair, Path(model), choose_sentences(documents, sentences), seed):
        print(f"{shown}\n")
    print(f"made {output}")


def load_pair(folder: Path) -> MetroForPreTraining:
    """The exported pair in fp32. Raises UserError for anything but an export."""
    missing = [name for name in ("config.json", "model*.safetensors") if not list(folder.glob(name))]
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}; give a folder that tools/convert_checkpoint.py wrote")
    return MetroForPreTraining.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def count_tokens(prefix: str, model: Path, vocab_size: int) -> NDArray[np.int64]:
    """Frequencies [V] of a dataset's ids. Raises UserError if its tokenizer is not the model's."""
    shards = open_shards([prefix])
    sha256 = Tokenizer.from_folder(model).sha256
    if shards[0].tokenizer_sha256 != sha256:
        raise UserError(
            f"{prefix} has tokenizer {shards[0].tokenizer_sha256[:12]}, {model} has {sha256[:12]}; "
            "give the shard that the model was trained on"
        )
    return sum((np.bincount(shard.tokens, minlength=vocab_size) for shard in shards), np.zeros(vocab_size, np.int64))


def describe(figures: dict[str, float], num_documents: int, num_rejected: int) -> str:
    """The figures beside their trivial values."""
    lines = [
        f"{num_documents:,} documents, {figures['num_tokens']:,} tokens, {figures['num_masked']:,} masked"
        + (f"; {num_rejected:,} records rejected" if num_rejected else ""),
        f"  MLM loss {figures['mlm_loss']:.3f} (unigram {figures['unigram_loss']:.3f}), "
        f"accuracy {figures['mlm_accuracy']:.3f} (most frequent token {figures['unigram_accuracy']:.3f})",
        f"  CLM loss {figures['clm_loss']:.3f}, accuracy {figures['clm_accuracy']:.3f}",
        f"  RTD loss {figures['rtd_loss']:.3f} (trivial {figures['rtd_trivial_loss']:.3f}), "
        f"AUC {figures['rtd_auc']:.3f} (trivial 0.5)",
        f"  replaced {figures['replace_rate']:.3f} of the tokens, found {figures['replace_accuracy']:.3f} of them; "
        f"kept {figures['non_replace_accuracy']:.3f} of the originals",
    ]
    return "\n".join(lines)


def _print_progress(done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"evaluation step {done}/{total}", flush=True)


if __name__ == "__main__":
    run_tool(main)
