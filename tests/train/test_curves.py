import json
import math
from pathlib import Path

import pytest

import metro_megatron.commands.plot_run as tool
from metro_megatron.config.file import save_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.objective.figures import panels
from metro_megatron.objective.terms import ALL
from metro_megatron.train.curves import VALIDATION, Run, smooth

PANELS = panels(ALL)
LOGGED = [name for panel in PANELS for name in panel.curves]


def write_run(folder: Path, num_lines: int) -> Path:
    folder.mkdir()
    lines: list[dict[str, float]] = []
    for i in range(1, num_lines + 1):
        lines.append({"step": i, **dict.fromkeys(LOGGED, 1 / i), "consumed_tokens": 100 * i, "tokens_per_second": 50})
        if i % 5 == 0:
            lines.append({"step": i, "probe/acceptability": 1 / i})
            lines.append({"step": i, **{VALIDATION + name: 1 / i for name in LOGGED}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_lines_of_training_and_validation_are_told_apart(tmp_path):
    run = Run.read(write_run(tmp_path / "one", 20))
    assert [len(run.training), len(run.validation)] == [20, 4]
    assert run.validation[1]["aux_loss"] == 0.1 and run.tokens_per_second() == pytest.approx(50)


def test_an_unfinished_last_line_is_left_out_and_another_is_an_error(tmp_path):
    path = write_run(tmp_path / "one", 3) / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "aux')
    assert len(Run.read(tmp_path / "one").training) == 3
    path.write_text('{"step": 4, "aux\n' + whole)
    with pytest.raises(UserError, match="line 1"):
        Run.read(tmp_path / "one")


def test_lines_of_fewer_steps_than_usual_are_joined_by_their_steps():
    def evened(*lines):
        named = [
            dict(zip(("step", "consumed_tokens", "aux_loss"), line, strict=True)) | {"digest": "f"} for line in lines
        ]
        found = Run("", named, []).even_lines
        assert all(line["digest"] == "f" for line in found)
        return [(line["step"], line["consumed_tokens"], line["aux_loss"]) for line in found]

    usual = [(25 * i, 100 * i, 5.0) for i in (1, 2, 3)]
    assert evened(*usual, (79, 316, 34.0)) == [*usual[:2], (79, 316, 9.0)], "(25 x 5 + 4 x 34) / 29"
    assert evened(*usual, (88, 352, 34.0))[-1] == (88, 352, 34.0), "half of the usual ones is enough"
    assert evened((5, 20, 9.0), *usual[:1], *usual[1:]) == [(25, 100, 5.8), *usual[1:]]
    # Nothing is measured in one of them; the run began at step 1,000.
    later = [(1000 + step, tokens, loss) for step, tokens, loss in usual]
    assert evened(*later, (1079, 316, math.nan)) == [*later[:2], (1079, 316, 5.0)]
    assert evened((4, 16, 3.0)) == [(4, 16, 3.0)]


def test_smoothing_is_a_mean_over_neighbors():
    assert smooth([0, 3, 6, 3], 1) == [0, 3, 4, 3]
    assert smooth([0, 1, 2, 3, 4], 2) == [0, 1, 2, 3, 4], "a slope stays where it is"


@pytest.mark.parametrize("name", ["curves.png", "curves.svg"])
def test_the_picture_of_two_runs(tmp_path, name):
    runs = [str(write_run(tmp_path / "one", 30)), str(write_run(tmp_path / "two", 1))]
    tool.main(tool.Options(runs, str(tmp_path / "pictures" / name)))
    content = (tmp_path / "pictures" / name).read_bytes()
    assert len(content) > 10_000
    if name.endswith("svg"):
        assert all(f"<!-- {panel.title} -->" in content.decode() for panel in PANELS)
        assert "<!-- one: AUC -->" in content.decode() and "<!-- two: MLM -->" in content.decode()


def test_schedules_are_drawn_over_the_whole_run_where_its_configuration_is_known(tmp_path):
    runs = [write_run(tmp_path / "one", 30), write_run(tmp_path / "two", 1)]
    save_config(Config(), runs[0] / "run_config.yaml")
    picture = tmp_path / "curves.svg"
    tool.main(tool.Options([str(run) for run in runs], str(picture)))
    assert "<!-- schedules -->" in picture.read_text()
    assert "<!-- optimizer.learning_rate, 1 is 0.0005 -->" in picture.read_text()
    assert "<!-- 100000 -->" in picture.read_text()
    tool.main(tool.Options([str(runs[1])], str(picture)))
    assert "<!-- schedules -->" not in picture.read_text()
    (runs[1] / "run_config.yaml").write_text("optimizer: {lrr: 3}\n")
    with pytest.raises(UserError, match=r"run_config.yaml: optimizer.lrr: no such key; did you mean optimizer.lr\?"):
        Run.read(runs[1])


def test_mistakes_are_reported_together(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(UserError) as caught:
        tool.main(tool.Options([str(tmp_path / "empty"), str(tmp_path / "none")], str(tmp_path / "x.png")))
    assert ["no logged step" in caught.value.problems[0], "no such file" in caught.value.problems[1]] == [True, True]
    run = str(write_run(tmp_path / "one", 3))
    with pytest.raises(UserError, match=r"\.png"):
        tool.main(tool.Options([run], str(tmp_path / "x.doc")))


def test_a_run_shows_the_curves_that_it_has(tmp_path):
    """Panels that two kinds of runs share have no empty curves, and panels of neither are not there."""
    for name, figures in (("plain", ("mlm_loss", "mlm_accuracy")), ("pair", ("aux_accuracy", "clm_accuracy"))):
        (tmp_path / name).mkdir()
        lines = ({"step": i, **dict.fromkeys(figures, 1 / i)} for i in (1, 2, 3))
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = tmp_path / "curves.svg"
    tool.main(tool.Options([str(tmp_path / name) for name in ("plain", "pair")], str(picture)))
    shown = picture.read_text()
    assert "<!-- plain: MLM of the main model -->" in shown and "<!-- pair: CLM -->" in shown
    assert "<!-- plain: CLM -->" not in shown and "<!-- replaced token detection -->" not in shown


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a/pretraining", "runs/b/pretraining"], ["a/pretraining", "b/pretraining"]),
        (["x/a/run", "y/a/run", "z"], ["x/a/run", "y/a/run", "z"]),
        (["a", "a"], ["a", "a"]),
        (["."], ["."]),
        (["runs/a/pretraining"], ["a/pretraining"]),
        (["pretraining"], ["pretraining"]),
    ],
)
def test_runs_of_one_name_are_told_apart_by_where_they_lie(folders, names):
    assert tool.distinct_names([Path(folder) for folder in folders]) == names
