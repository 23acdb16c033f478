"""README's block "Your own data", run as it is written, on a megabyte of generated text."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.test_disturbed import wait_for

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


def started(command: str, folder: Path) -> subprocess.Popen[str]:
    """In a folder that has what a checkout has, by this interpreter, on a machine without GPUs."""
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    words = f"exec {command}"
    return subprocess.Popen(
        words, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


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
    outputs = {}
    for command in block():
        process = started(command, tmp_path)
        if command.startswith("torchrun"):  # thousands of steps, which are minutes: the first are enough
            metrics = tmp_path / "runs" / "corpus" / "metrics.jsonl"
            wait_for(lambda: metrics.exists() and metrics.read_text(), 600)  # noqa: B023 - called here alone
            for rank in psutil.Process(process.pid).children():
                rank.terminate()
        outputs[command], _ = process.communicate()
        assert process.returncode == 0, outputs[command]
    pretrain = " ".join(block()[3].split())
    assert f"  {pretrain}\n" in outputs[block()[1]], "the line that preprocessing prints"
    assert "125 samples held out" in outputs[block()[3]]
    assert (tmp_path / "models" / "corpus" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "corpus-task").is_dir()
