"""Rates are chosen on rows that are held out of those to learn from, and what is done is not done again."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from metro_megatron.commands.compare_runs import compare, read_arm
from metro_megatron.errors import UserError
from tools.campaign import finetuned
from tools.campaign.finetuned import CLASSES, Options, main, runs_of
from tools.campaign.rows import COLUMNS, put_row, scores_beside

TASK = "sentiment"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Tuning:
    """What tools/finetune.py would do, of a model that is right at rate 0.002 more often than at others."""

    def __init__(self):
        self.calls = []

    def __call__(self, command, log=None):
        given = dict(zip(command[2::2], command[3::2], strict=True))
        self.calls.append(given)
        rows = read(Path(given["--validation_file"]))
        wrong = 1 if given["--learning_rate"] == "0.002" else 2
        output = Path(given["--output"])
        output.mkdir(parents=True)
        (output / "model.safetensors").touch()
        lines = (row | {"prediction": "x" if number < wrong else row["label"]} for number, row in enumerate(rows))
        (output / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (output / "metrics.json").write_text(json.dumps({"accuracy": 1 - wrong / len(rows)}))


@pytest.fixture
def campaign(tmp_path, monkeypatch):
    """Two arms of two seeds; runs of another rate and budget beside them."""
    options = Options(["metro", "mlm_15"], [TASK], [1e-3, 2e-3, 4e-3], 2, str(tmp_path), str(tmp_path / "rows.csv"))
    for name, size in (("train", 8), ("test", 6)):
        rows = ({"id": f"{name}{number}", "text": "a", "label": str(number % 2)} for number in range(size))
        file = tmp_path / "tasks" / TASK / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arm in options.arms:
        for seed, rate, flops in ((1, "1", "2e13"), (2, "1", "2e13"), (1, "3", "2e13"), (1, "1", "1e13")):
            run = f"{arm}-{seed}-{rate}-{flops}"
            row = dict.fromkeys(COLUMNS, "") | {"run": run, "arm": arm, "seed": seed, "lr": rate, "flops": flops}
            put_row(tmp_path / "rows.csv", row | {"validation": "1"})
            (tmp_path / run / "model").mkdir(parents=True)
            (tmp_path / run / "model" / "config.json").touch()
    call = Tuning()
    monkeypatch.setattr(finetuned, "Commands", lambda: call)
    return options, call


def test_every_seed_learns_at_the_rate_that_rows_held_out_have_chosen(campaign, tmp_path, capsys):
    options, call = campaign
    main(options)
    arm = [given for given in call.calls if "/metro-" in given["--model"]]
    assert [given["--learning_rate"] for given in arm] == ["0.001", "0.002", "0.004", "0.002", "0.002"]
    learned, held_out = (read(Path(arm[0][f"--{name}_file"])) for name in ("train", "validation"))
    assert [row["id"] for row in learned + held_out] == [f"train{number}" for number in range(8)]
    assert len(held_out) == 2
    assert {Path(given["--model"]).parent.name for given in arm} == {"metro-1-1-2e13", "metro-2-1-2e13"}
    assert {(given["--train_file"], given["--validation_file"]) for given in arm[3:]} == {
        (f"{tmp_path}/tasks/{TASK}/train.jsonl", f"{tmp_path}/tasks/{TASK}/test.jsonl")
    }
    assert not list(tmp_path.rglob("*.safetensors"))
    folders = [
        [str(scores_beside(tmp_path / "rows.csv") / f"{arm}-{n}-1-2e13") for n in (1, 2)] for arm in options.arms
    ]
    kept = Path(folders[0][0]) / "scores" / "finetuned" / f"{TASK}.jsonl.gz"
    assert [json.loads(line)["score"] for line in gzip.decompress(kept.read_bytes()).splitlines()] == [0, 1, 1, 1, 1, 1]
    (found,) = compare(*map(read_arm, folders))
    assert (found.task, found.num_items) == (f"finetuned.{TASK}", 6)
    done = len(call.calls)
    main(options)
    assert len(call.calls) == done, "all is there"
    main(replace(options, epochs=3))
    assert [given["--epochs"] for given in call.calls[done:]] == ["3"] * done, "which is another recipe"
    assert f"metro, seed 2, {TASK} at 0.002: accuracy 0.8333" in capsys.readouterr().out


def test_what_cannot_be_fine_tuned_is_refused(campaign, tmp_path):
    options, _ = campaign
    (tmp_path / "mlm_15-2-1-2e13" / "model" / "config.json").unlink()
    with pytest.raises(UserError, match=r"mlm_15-2-1-2e13/model is not here; make learn exports it"):
        main(options)
    assert not list(tmp_path.rglob("finetuned")), "before anything is done"
    with pytest.raises(UserError, match="--tasks cloze: has no classes to learn; there are acceptability"):
        main(Options(tasks=["cloze"]))
    with pytest.raises(UserError, match=r"no run of metro|no runs of metro"):
        runs_of("metro", Options(results=str(tmp_path / "none.csv")))
    assert len(CLASSES) == 6
