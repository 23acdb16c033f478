"""The program as users start it: on real text, with torchrun, interrupted, and with mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from metro_megatron.checkpoint.files import TRACKER
from metro_megatron.preprocess.run import PreprocessOptions, preprocess
from metro_megatron.tokenizer.training import train_tokenizer
from tests.distributed import run_program

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 700
LINE_KEYS = {
    "step",
    "consumed_samples",
    "aux_loss",
    "rtd_loss",
    "clm_loss",
    "grad_norm",
    "shared_grad_norm",
    "stage_grad_norm",
    "replace_rate",
    "replace_accuracy",
    "non_replace_accuracy",
    "rtd_auc",
    "rtd_precision",
    "sampled_accuracy",
    "aux_accuracy",
    "clm_accuracy",
    "non_pad_fraction",
    "learning_rate",
    "loss_scale",
    "skipped_steps",
    "tokens_per_second",
    "data_share",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Path:
    """Prefix of a shard of real reviews."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "reviews.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in real_texts))
    train_tokenizer([[text] for text in real_texts], VOCAB_SIZE, folder / "tokenizer")
    preprocess(PreprocessOptions([str(texts)], str(folder / "tokenizer"), str(folder / "reviews")))
    return folder / "reviews"


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("yaml") / "tiny.yaml"
    tiny = {
        "model": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "ffn_hidden_size": 64,
            "num_layers": 2,
            "auxiliary_num_layers": 1,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 64,
        },
        "data": {"seq_length": 64, "micro_batch_tokens": 256, "validation_fraction": 0.1},
        "optimizer": {"lr": 1e-3, "lr_warmup_steps": 2},
        "checkpoint": {"save_interval": 3, "keep_last": 2},
        "train": {
            "train_steps": 7,
            "global_batch_size": 8,
            "precision": "fp32",
            "device": "cpu",
            "log_interval": 2,
            "eval_interval": 4,
            "eval_samples": 16,
        },
    }
    path.write_text(yaml.safe_dump(tiny))
    return path


def command(yaml_file: Path, corpus: Path, output: Path, *options: str, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [
        *launcher,
        str(ROOT / "pretrain_metro.py"),
        *("--config", str(yaml_file), "--data.train", str(corpus), "--train.output", str(output)),
        *options,
    ]


def run(*args: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    words = command(*args, processes=processes)  # type: ignore[arg-type]
    if processes == 1:
        return run_program(*words[1:], timeout=200)
    return subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_evaluate_save_and_continue(yaml_file: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = run(yaml_file, corpus, output, processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 7/7") == 1
    assert result.stdout.count("Fused operators: plain torch, because kernels need a CUDA device") == 1
    training = [line for line in lines(output) if "aux_loss" in line]
    validation = [line for line in lines(output) if "validation/aux_loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 7]
    assert [line["step"] for line in validation] == [4, 7]
    assert all(line.keys() >= LINE_KEYS for line in training)
    assert [line["consumed_samples"] for line in training] == [16, 32, 48, 56]
    assert (output / TRACKER).read_text() == "7\n"
    assert sorted(path.name for path in output.glob("iter_*")) == ["iter_0000006", "iter_0000007"]
    names = {path.name for path in (output / "iter_0000007").iterdir()}
    assert names >= {"run_config.yaml", "progress.json", "integrity.json", "metadata.json", "common.pt"}
    assert {path.name for path in output.iterdir()} >= {"run_config.yaml", "tokenizer", "tensorboard"}
    assert list((output / "tensorboard").iterdir())

    other = run(yaml_file, corpus, output, "--optimizer.lr", "0.5", processes=2)
    assert other.returncode == 1
    assert other.stderr.count("optimizer.lr is 0.5, but the checkpoint was made with 0.001") == 1
    # Complete, under another layout and without kernels: nothing is left to do.
    again = run(yaml_file, corpus, output, "--train.fused", "reference")
    assert "torch references, because the run asks for them" in again.stdout
    assert again.returncode == 0 and again.stdout.endswith(f"{output} is finished: all its 7 steps are done\n")
    assert lines(output) == training[:2] + validation[:1] + training[2:] + validation[1:]


SIXTY_STEPS = ("--train.train_steps", "60", "--train.log_interval", "1")


@pytest.fixture(scope="module")
def straight(yaml_file: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of sixty steps without interruption."""
    output = tmp_path_factory.mktemp("straight") / "run"
    assert run(yaml_file, corpus, output, *SIXTY_STEPS, "--checkpoint.save_interval", "1000").returncode == 0
    return output


@pytest.mark.parametrize("first_save", [1000, pytest.param(25, marks=pytest.mark.long)])
def test_sigterm_saves_and_the_same_command_continues(
    yaml_file: Path, corpus: Path, straight: Path, tmp_path: Path, first_save: int
) -> None:
    """Before and after a first checkpoint; the signal goes to the whole process group, as torchrun and Slurm send it.

    The lines of the interrupted run equal those of a straight one.
    """
    options = (*SIXTY_STEPS, "--checkpoint.save_interval", str(first_save))
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command(yaml_file, corpus, broken, *options), env=environment(), stdout=subprocess.PIPE, start_new_session=True
    )
    awaited = broken / (TRACKER if first_save == 25 else "metrics.jsonl")
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (awaited.exists() and awaited.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    stopped = int((broken / TRACKER).read_text())
    assert 1 <= stopped < 60
    assert run(yaml_file, corpus, broken, *options).returncode == 0
    timed = {"tokens_per_second", "tflops_per_gpu", "seconds_per_step", "data_share"}
    same = [{name: value for name, value in line.items() if name not in timed} for line in lines(straight)]
    assert [{name: value for name, value in line.items() if name not in timed} for line in lines(broken)] == same


def test_mistakes_are_printed_once_with_remedies(yaml_file: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ("--model.num_attention_heads", "3", "--data.seq_length", "100", "--optimizer.lr_warmup_steps", "9")
    result = run(yaml_file, corpus, output, *options, processes=2)
    assert result.returncode == 1 and not output.exists()
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(set(errors)) >= 3
    for part in ("num_attention_heads", "seq_length", "lr_warmup_steps"):
        assert sum(part in error for error in errors) == 1, (part, errors)
    alone = run(yaml_file, corpus, output, "--data.trian", "x")
    assert alone.returncode == 2 and "data.train" in alone.stderr and "Traceback" not in alone.stderr


def test_data_that_does_not_fit_is_refused(yaml_file: Path, corpus: Path, tmp_path: Path) -> None:
    wrong = run(yaml_file, corpus, tmp_path / "run", "--model.vocab_size", "701")
    assert wrong.returncode == 2 and f"set model.vocab_size to {VOCAB_SIZE}" in wrong.stderr
    missing = run(yaml_file, tmp_path / "nothing", tmp_path / "run")
    assert missing.returncode == 2 and str(tmp_path / "nothing") in missing.stderr
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("reader")
    foreign = run(yaml_file, corpus, tmp_path / "letters")
    assert foreign.returncode == 2 and "not a run folder" in foreign.stderr
    assert (tmp_path / "letters" / "dear.txt").read_text() == "reader"
    for result in (wrong, missing, foreign):
        assert "Traceback" not in result.stderr and result.stderr.count("error: ") == 1


@pytest.mark.long
def test_a_frozen_run_from_a_run_and_its_cache(corpus: Path, yaml_file: Path, tmp_path: Path) -> None:
    """Fast-ELECTRA from the beginning: an auxiliary is trained, frozen, and its draws are cached."""
    assert run(yaml_file, corpus, tmp_path / "pair").returncode == 0
    cooling = ["--corruption.temperature_schedule", "exponential", "--corruption.temperature", "2"]
    frozen = ["--corruption.source", "frozen", "--corruption.frozen_model", str(tmp_path / "pair"), *cooling]
    cached = ["--corruption.source", "cached", "--corruption.cache", str(tmp_path / "cache"), *cooling]
    online = run(yaml_file, corpus, tmp_path / "online", *frozen)
    assert online.returncode == 0, online.stderr
    words = command(yaml_file, corpus, tmp_path / "online", *frozen)[2:]
    tool = run_program(ROOT / "tools" / "cache_corruption.py", "--output", tmp_path / "cache", *words, timeout=200)
    assert tool.returncode == 0, tool.stderr
    assert "7 steps of 56 samples, 16 of the evaluations" in tool.stdout
    assert f"--corruption.source cached --corruption.cache {tmp_path / 'cache'}" in tool.stdout
    from_cache = run(yaml_file, corpus, tmp_path / "cached", *cached)
    assert from_cache.returncode == 0, from_cache.stderr
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("online", "cached")
    ]
    for one, other in zip(*lines, strict=True):
        same = [name for name in one if name.endswith(("rtd_loss", "clm_loss", "replace_rate", "grad_norm"))]
        assert same and [one[name] for name in same] == [other[name] for name in same]
    other = run(yaml_file, corpus, tmp_path / "other", *cached, "--train.seed", "5")
    assert other.returncode == 2 and "seed is 5, in the cache 1" in other.stderr
    (tmp_path / "pair" / TRACKER).write_text("6\n")
    resumed = run(yaml_file, corpus, tmp_path / "online", *frozen, "--train.log_interval", "1")
    assert resumed.returncode == 2 and "the model or cache is not the one that" in resumed.stderr


@pytest.mark.long
def test_a_branch_in_phases_from_the_command_line(corpus: Path, yaml_file: Path, tmp_path: Path) -> None:
    """The parent's middle checkpoint, two steps more on shorter samples, at a rate that falls."""
    assert run(yaml_file, corpus, tmp_path / "parent").returncode == 0
    options = [
        *("--train.branch_from", tmp_path / "parent" / "iter_0000006"),
        *("--train.train_steps", "9", "--optimizer.lr_decay_steps", "3", "--optimizer.lr_decay_style", "1-sqrt"),
        *("--train.phases", "{start: 7, seq_length: 32, mask_probability: 0.3, lr_factor: 0.5}"),
        *("--train.log_interval", "1"),
    ]
    result = run(yaml_file, corpus, tmp_path / "branch", *options)
    assert result.returncode == 0, result.stderr
    assert "iter_0000006 after step 6" in result.stdout
    rates = [line["learning_rate"] for line in lines(tmp_path / "branch") if "learning_rate" in line]
    assert rates == pytest.approx([1e-3, 0.5e-3 * (1 - (1 / 3) ** 0.5), 0.5e-3 * (1 - (2 / 3) ** 0.5)], rel=1e-12)
    other = run(yaml_file, corpus, tmp_path / "other", *options, "--train.seed", "5")
    assert other.returncode == 2 and "train.seed is 5, but the checkpoint was made with 1" in other.stderr


@pytest.mark.long
def test_a_run_begins_with_the_weights_of_an_export_of_another(corpus: Path, yaml_file: Path, tmp_path: Path) -> None:
    assert run(yaml_file, corpus, tmp_path / "first").returncode == 0
    tool = run_program(
        ROOT / "tools" / "convert_checkpoint.py", "--load", tmp_path / "first", "--output", tmp_path / "hf", timeout=200
    )
    assert tool.returncode == 0, tool.stderr
    given = ("--train.initialize_from", tmp_path / "hf")
    second = run(yaml_file, corpus, tmp_path / "second", *given)
    assert second.returncode == 0, second.stderr
    assert (
        f"weights of {tmp_path / 'hf'}: 53 tensors; no moments are in it, the optimizer and the data" in second.stdout
    )
    first, again = (lines(tmp_path / name) for name in ("first", "second"))
    assert again[0]["consumed_samples"] == first[0]["consumed_samples"]
    assert again[0]["aux_loss"] < first[0]["aux_loss"] and again[0]["clm_loss"] < first[0]["clm_loss"]
    (tmp_path / "hf").rename(tmp_path / "moved")
    resumed = run(yaml_file, corpus, tmp_path / "second", *given)
    assert resumed.returncode == 0 and "continuing" in resumed.stdout and "weights of" not in resumed.stdout
    without = run(yaml_file, corpus, tmp_path / "second")
    assert without.returncode == 2 and "train.initialize_from is [], but the checkpoint was made with" in without.stderr
    given = ("--train.initialize_from", tmp_path / "moved")
    wrong = run(
        yaml_file, corpus, tmp_path / "third", *given, "--model.hidden_size", "64", "--model.reset_cls", "false"
    )
    assert wrong.returncode == 2 and wrong.stderr.count("error: ") == 3 and "Traceback" not in wrong.stderr
    assert "give --model.hidden_size 32 --model.reset_cls true" in wrong.stderr
    assert f"model.hidden_size is 64, {tmp_path / 'moved'} has 32" in wrong.stderr
