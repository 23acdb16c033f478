"""README's block "Your own data", run as it is written, on a megabyte of generated text."""

import gzip
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def block() -> list[str]:
    """The commands of README's block."""
    _, _, section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own data\n")
    return section.split("```")[1].strip().replace("\\\n", " ").splitlines()


def write_corpus(folder: Path) -> None:
    """4,000 documents of a megabyte in all, whose words have some frequency and order."""
    generator = random.Random(3)
    syllables = [first + second for first in "bdfglmnprst" for second in ("a", "e", "i", "o", "ur", "an")]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(3000)]
    folder.mkdir()
    for number in range(2):
        with gzip.open(folder / f"part{number}.jsonl.gz", "wt") as file:
            for _ in range(2000):
                first = generator.randrange(len(words))
                chosen = [words[min(2999, int(first * generator.random() ** 3))] for _ in range(45)]
                file.write(json.dumps({"text": " ".join(chosen) + "."}) + "\n")


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a folder that has what a checkout has, by this interpreter."""
    command = re.sub(r"^torchrun ", "python -m torch.distributed.run ", command)
    line = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_block_works_as_it_is_written(tmp_path: Path) -> None:
    for name in ("tools", "examples", "pretrain_metro.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_corpus(tmp_path / "corpus")
    parts = [gzip.decompress(path.read_bytes()) for path in (tmp_path / "corpus").iterdir()]
    assert 1_000_000 < sum(map(len, parts)) < 2_000_000
    for name, first in (("train.csv", 0), ("dev.csv", 24)):
        rows = (f"baba dede {number},{number % 2}\n" for number in range(first, first + 24))
        (tmp_path / name).write_text("text,label\n" + "".join(rows))
    tokenizer, preprocess, inspect, pretrain, convert, finetune = block()
    printed = ""
    for command in (tokenizer, preprocess, inspect):
        result = run(command, tmp_path)
        assert result.returncode == 0, result.stderr
        printed += result.stdout
    on_gpus, on_cpu = (line.strip() for line in printed.splitlines() if line.startswith("  torchrun"))
    assert on_gpus == f"{pretrain} --data.validation_fraction 0.03", "README's line, and what to hold out"
    refused = run(pretrain.replace("--nproc-per-node 8", "--nproc-per-node 1"), tmp_path).stderr
    assert refused.startswith("error: train.precision is bf16, but torch finds no GPU")
    for command in (f"{on_cpu} --train.train_steps 4 --optimizer.lr_warmup_steps 1", convert, f"{finetune} --epochs 1"):
        result = run(command, tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "models" / "corpus" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "corpus-task").is_dir()
