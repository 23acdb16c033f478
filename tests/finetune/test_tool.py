"""tools/finetune.py from its command line."""

from pathlib import Path

import pytest

from metro_megatron.cli.command_line import call_with_options, exit_code
from metro_megatron.commands.finetune import main
from tests.finetune.test_classification import good_or_bad


def write_csv(path: Path, count: int, seed: int) -> str:
    texts = good_or_bad(count, seed)
    path.write_text("text,label\n" + "".join(f"{a},{b}\n" for a, b in zip(texts.first, texts.labels, strict=True)))
    return str(path)


def test_says_what_it_made(export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(export_folder), "--task", "classification", "--output", str(tmp_path / "out")]
    argv += ["--train_file", write_csv(tmp_path / "t.csv", 32, 1), "--device", "cpu", "--epochs", "1"]
    argv += ["--validation_file", write_csv(tmp_path / "v.csv", 8, 2), "--seed", "3", "--from_scratch"]
    assert exit_code(lambda: call_with_options(main, argv)) == 0
    assert f"made {tmp_path / 'out'}: classifier" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_another_task_by_its_name(export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("t", "v"):
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "".join(f"the {name} cat\t{i}.5\n" for i in range(8)))
    argv = ["--model", str(export_folder), "--task", "regression", "--output", str(tmp_path / "out")]
    argv += ["--train_file", str(tmp_path / "t.tsv"), "--device", "cpu", "--epochs", "1"]
    argv += ["--validation_file", str(tmp_path / "v.tsv")]
    assert exit_code(lambda: call_with_options(main, argv)) == 0
    assert "out: regressor, predictions.jsonl, metrics.json; pearson 0.0000 on 8 texts" in capsys.readouterr().out


def test_mistakes_in_options_name_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "m", "--task", "classification", "--train_file", "t"]
    assert exit_code(lambda: call_with_options(main, [*argv, "--epochs", "0", "--seed", "-1"])) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --epochs is 0, must be at least 1",
        "error: --seed is -1, must be at least 0",
        "error: --output: required, but not given; see --help",
    ]


def test_both_bad_files_are_reported(export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(export_folder), "--task", "classification", "--output", str(tmp_path / "out")]
    argv += ["--train_file", str(tmp_path / "t.csv"), "--validation_file", str(tmp_path / "v.txt")]
    assert exit_code(lambda: call_with_options(main, argv)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(error.startswith("error: ") for error in errors)
    assert not (tmp_path / "out").exists()
