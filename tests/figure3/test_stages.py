"""tools/figure3/figure3.mk: what it would run, and what it runs again."""

import os
import shlex
import subprocess
from pathlib import Path

from metro_megatron.config.file import parse_config
from metro_megatron.config.problems import problems
from tools.figure3.picture import LEGENDS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "MAKEFLAGS": ""}


def planned(output: Path) -> list[list[str]]:
    """The commands that train, in order, without running any."""
    make = ["make", "-n", "--no-print-directory", "-f", "tools/figure3/figure3.mk", f"OUTPUT={output}"]
    result = subprocess.run(make, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    lines = result.stdout.replace("\\\n", "").splitlines()
    return [shlex.split(line)[2:] for line in lines if "pretrain_metro.py" in line]


def test_every_arm_is_trained_with_the_paper_s_ratio_of_rates_and_a_finished_one_not_again(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arms = {Path(config.train.output).name: config for config in map(parse_config, planned(tmp_path))}
    assert list(arms) == list(LEGENDS)
    assert [found for config in arms.values() for found in problems(config, 1)] == []
    high, low, clipped, scaled = arms.values()
    assert high.optimizer.lr / low.optimizer.lr == 1e-4 / 2e-5
    assert (high.optimizer.clip_grad, clipped.optimizer.clip_grad, clipped.optimizer.lr) == (2, 1, high.optimizer.lr)
    assert (clipped.model.scaled_init_targets, scaled.model.scaled_init_targets) == ("none", "ffn")
    first = [tmp_path / "text.jsonl", tmp_path / "tokenizer" / "report.json"]
    first += [tmp_path / "shards" / "text.manifest.json", *(tmp_path / f"{arm}.begun" for arm in arms)]
    for path in [*first, *(tmp_path / f"{arm}.done" for arm in list(arms)[:3])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [parse_config(words).train.output for words in planned(tmp_path)] == [str(tmp_path / list(arms)[3])]
