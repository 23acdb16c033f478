"""Documents to a tokenizer folder: tokenizer.model, the equal tokenizer.json, tokenizer_config.json."""

import shlex
import sys
from collections import Counter
from pathlib import Path

from metro_megatron.command_line import run_tool
from metro_megatron.data.documents import Reject, check_inputs, read_documents
from metro_megatron.data.progress import ReadingProgress
from metro_megatron.data.tokenizer import TOKENIZER_FILES
from metro_megatron.data.tokenizer_training import TrainingReport, sample_documents, train_tokenizer
from metro_megatron.errors import UserError


def main(
    input: list[str],
    vocab_size: int,
    output: str,
    sample_bytes: int = 1_000_000_000,
    text_key: str = "text",
    max_document_bytes: int = 10_000_000,
    seed: int = 1,
    overwrite: bool = False,
) -> None:
    """Train a cased SentencePiece BPE tokenizer with byte fallback on a uniform sample of documents.

    Equal input and options give equal files.

    Args:
        input: Files: .jsonl (a JSON object per line) or .txt (blank lines between documents); .gz, .zst too.
        vocab_size: Number of ids, the 5 specials and 256 bytes included.
        output: Folder to write.
        sample_bytes: Text to train on in bytes; memory needed is about 6 times that.
        text_key: Key of the text in JSON objects.
        max_document_bytes: Longest record in bytes; longer ones are left out.
        seed: Which documents are sampled, if not all.
        overwrite: Replace a tokenizer that is there already.
    """
    if sample_bytes < 1 or max_document_bytes < 1:
        raise UserError(
            f"--sample_bytes {sample_bytes}, --max_document_bytes {max_document_bytes}: must be positive"
        )
    check_inputs(input)
    existing = [name for name in TOKENIZER_FILES if (Path(output) / name).exists()]
    if existing and not overwrite:
        raise UserError(
            f"--output {output} holds {existing[0]} already; choose another folder or add --overwrite"
        )
    rejects: Counter[Reject] = Counter()
    with ReadingProgress("reading", sum(Path(path).stat().st_size for path in input)) as progress:
        documents = read_documents(
            input, rejects, text_key, max_document_bytes, lambda position: progress.update(position, position)
        )
        sample = sample_documents(documents, sample_bytes, seed)
    print(f"training on {len(sample):,} documents", file=sys.stderr, flush=True)
    report = train_tokenizer(sample, vocab_size, Path(output))
    print(describe(report, rejects, output))


def describe(report: TrainingReport, rejects: Counter[Reject], output: str) -> str:
    """The closing report, ending with the next command."""
    lines = [
        (
            f"{output}: {report.vocab_size:,} ids, trained on {report.sampled_bytes / 1e6:,.1f} MB in "
            f"{report.sampled_documents:,} documents, {report.seconds:,.1f} s"
        ),
        f"  tokenizer.json equals tokenizer.model on {report.checked_bytes / 1e6:,.1f} MB of them",
        (
            f"  fertility {report.tokens_per_word:.3f} tokens per word, {report.bytes_per_token:.2f} bytes "
            f"per token, byte fallback {report.byte_fallback_rate:.3%} of tokens"
        ),
    ]
    if rejects:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejects.items()))
        lines.append(f"  rejected records: {counts}")
    lines += [
        "next:",
        (
            f"  python tools/preprocess_data.py --input FILE... --tokenizer {shlex.quote(output)} "
            "--output_prefix PREFIX --workers 2"
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
