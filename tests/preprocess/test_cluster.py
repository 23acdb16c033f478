"""A real Ray cluster on this machine gives the same bytes; its failures reach the user."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preprocess.test_preprocess import environment, lines

RUN = """
import sys
from metro_megatron.cli.command_line import exit_code
from metro_megatron.preprocess.run import PlanOptions, PreprocessOptions, preprocess

def main():
    path, tokenizer, prefix, cluster = sys.argv[1:]
    plan = PlanOptions(chunk_bytes=100_000, shard_bytes=200_000, drop_duplicates=True)
    preprocess(PreprocessOptions([path], tokenizer, prefix, plan, engine_cluster=cluster))

sys.exit(exit_code(main))
"""


def test_ray_gives_the_same_bytes(tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path) -> None:
    pytest.importorskip("ray")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines(reviews)))
    for cluster in ("", "ray"):
        arguments = [str(path), str(tokenizer_folder), str(tmp_path / f"out{cluster}" / "s"), cluster]
        result = subprocess.run(
            [sys.executable, "-c", RUN, *arguments], env=environment(), capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
    for name in ("s.manifest.json", "s_00000.bin", "s_00001.idx", "s_00002.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "outray" / name).read_bytes()
    assert json.loads((tmp_path / "outray" / "s.manifest.json").read_bytes())["documents"] > 900
    arguments[0] = str(tmp_path / "broken.jsonl.gz")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    arguments[2] = str(tmp_path / "broken" / "s")
    result = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "broken.jsonl.gz" in result.stderr
