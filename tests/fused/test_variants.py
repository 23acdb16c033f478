"""No kernel is compiled in the middle of a run because a micro batch has another number of rows or samples."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# 128-bit loads of rows of scores need a number of keys that 16 divides.
TWO = {f"softmax_dropout.kernels.{name}_kernel": 2 for name in ("forward", "backward", "diagonal")}


def test_one_variant_of_a_kernel_serves_every_micro_batch():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.fused.variants"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    variants = {name: int(count) for name, count in (line.split() for line in done.stdout.splitlines())}
    assert len(variants) == 13
    assert variants == dict.fromkeys(variants, 1) | TWO
