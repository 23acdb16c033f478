"""tools/finetune.py from its command line."""

import json
import re
from pathlib import Path

import pytest

from metro_megatron.cli.command_line import call_with_options, exit_code
from metro_megatron.commands.finetune import main
from tests.finetune.layouts import write_superglue
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
    assert "out: regressor, metrics.json, predictions.jsonl; pearson 0.0000" in capsys.readouterr().out


def test_mistakes_in_options_name_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "m", "--task", "classification", "--train_file", "t"]
    assert exit_code(lambda: call_with_options(main, [*argv, "--epochs", "0", "--seed", "-1"])) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --epochs is 0, must be at least 1",
        "error: --seed is -1, must be at least 0",
        "error: --output: required, but not given; see --help",
    ]


def test_delimiters_as_a_shell_hands_them_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("t", "v"):
        (tmp_path / f"{name}.csv").write_text(f"text\tlabel\n{name}\t1\n{name}, x\t1\n")
    argv = ["--model", str(tmp_path), "--task", "classification", "--output", str(tmp_path / "out")]
    argv += ["--train_file", str(tmp_path / "t.csv"), "--validation_file", str(tmp_path / "v.csv"), "--delimiter"]
    assert exit_code(lambda: call_with_options(main, [*argv, r"\t"])) == 2
    assert "all 2 training texts have the label '1'" in capsys.readouterr().err
    assert exit_code(lambda: call_with_options(main, [*argv, "ab"])) == 2
    assert capsys.readouterr().err.startswith("error: delimiter is 'ab', must be one character")


def test_both_bad_files_are_reported(export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(export_folder), "--task", "classification", "--output", str(tmp_path / "out")]
    argv += ["--train_file", str(tmp_path / "t.csv"), "--validation_file", str(tmp_path / "v.txt")]
    assert exit_code(lambda: call_with_options(main, argv)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(error.startswith("error: ") for error in errors)
    assert not (tmp_path / "out").exists()


def test_a_table_with_other_columns_and_texts_to_predict(
    export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = good_or_bad(24, 1)
    rows = [f"{i};{text};{label}\n" for i, (text, label) in enumerate(zip(texts.first, texts.labels, strict=True))]
    (tmp_path / "t.csv").write_text("id;review;verdict\n" + "".join(rows[:16]))
    (tmp_path / "v.csv").write_text("id;review;verdict\n" + "".join(rows[16:]))
    (tmp_path / "p.csv").write_text("id;review\n" + "".join(row.rpartition(";")[0] + "\n" for row in rows[16:]))
    argv = ["--model", str(export_folder), "--task", "classification", "--output", str(tmp_path / "out")]
    argv += ["--train_file", str(tmp_path / "t.csv"), "--validation_file", str(tmp_path / "v.csv"), "--device", "cpu"]
    argv += ["--predict_file", str(tmp_path / "p.csv"), "--text_columns", "review", "--label_columns", "verdict"]
    assert exit_code(lambda: call_with_options(main, [*argv, "--epochs", "1"])) == 0
    printed = capsys.readouterr().out
    assert "note: 'good' for every one of the validation texts would have an accuracy of 0.5000" in printed
    assert "predictions_predict.jsonl" in printed
    scored, predicted = (
        [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("predictions.jsonl", "predictions_predict.jsonl")
    )
    assert [line.pop("label") for line in scored] == texts.labels[16:]
    assert [line["id"] for line in predicted] == [str(i) for i in range(16, 24)]
    for one, other in zip(scored, predicted, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_a_benchmarks_task_by_its_name(export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_superglue(tmp_path / "superglue")
    argv = ["--model", str(export_folder), "--task", "superglue_rte", "--data", str(tmp_path / "superglue")]
    argv += ["--output", str(tmp_path / "out"), "--device", "cpu", "--epochs", "1"]
    assert exit_code(lambda: call_with_options(main, argv)) == 0
    printed = capsys.readouterr().out
    assert "out: classifier, metrics.json, predictions.jsonl, predictions_axb.jsonl, predictions_axg.jsonl" in printed
    assert re.search(
        r"accuracy \d\.\d{4}, mcc_axb -?\d\.\d{4}, .*gender_parity_axg \d\.\d{4} on 2 texts after", printed
    )
