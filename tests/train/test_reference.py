"""Curves of healthy runs: means of a run's lines, read back as written, drawn as a line or as a band over seeds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import metro_megatron.commands.plot_run as tool
from metro_megatron.config.file import save_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.train.curves import Run, over_tokens
from metro_megatron.train.reference import CURVES, MOST_ROWS, Band, Reference, bands, reference_names

CONFIG = Config()


def write_run(folder: Path, losses: list[float], config: Config = CONFIG) -> Path:
    """A run that logs every step of 50 tokens."""
    folder.mkdir()
    lines = [
        {"step": i, "consumed_tokens": 50 * i, "aux_loss": loss, "rtd_auc": 0.5, "grad_norm": 1.0}
        for i, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_config(config, folder / "run_config.yaml")
    return folder


def with_seed(seed: int, **model: int) -> Config:
    return replace(CONFIG, train=replace(CONFIG.train, seed=seed), model=replace(CONFIG.model, **model))


def write_curve(folder: Path, name: str, losses: list[float], config: Config = CONFIG) -> Path:
    path = folder / f"{name}.csv"
    Reference.of(Run.read(write_run(folder / name, losses, config)), name, "abc").write(path)
    return path


def test_a_long_run_is_thinned_to_means(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).uniform(1, 9, 2 * MOST_ROWS + 5)
    config = with_seed(4, num_layers=3)
    reference = Reference.of(Run.read(write_run(tmp_path / "run", losses.tolist(), config)), "mine-4", "abc")
    assert list(reference.columns) == ["step", "tokens", "aux_loss", "rtd_auc"], "what is drawn"
    blocks = [losses[i : i + 3] for i in range(0, len(losses), 3)]
    np.testing.assert_allclose(reference.columns["aux_loss"], [block.mean() for block in blocks], rtol=1e-12)
    assert reference.columns["tokens"][[0, -1]].tolist() == [150, 50 * len(losses)]
    assert dict(reference.facts) == {"seed": "4", "commit": "abc", "data.train": "", "model.num_layers": "3"}
    reference.write(tmp_path / "mine.csv")
    again = Reference.read(tmp_path / "mine.csv")
    assert (again.name, again.facts) == ("mine-4", reference.facts)
    for name, column in reference.columns.items():
        np.testing.assert_allclose(again.columns[name], column, rtol=5e-5)


def test_the_curves_of_the_program_are_as_the_tool_writes_them(tmp_path: Path) -> None:
    paths = sorted(CURVES.glob("*.csv"))
    assert {"metro", "electra", "mlm_15"} <= {*reference_names()}
    for path in paths:
        reference = Reference.read(path)
        reference.write(tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes() and path.stat().st_size < 20_000
        assert 100 <= len(reference.columns["step"]) <= MOST_ROWS
        assert path.stem == reference.name and path.stem.endswith(f"-{reference.facts['seed']}")
        assert len(reference.facts["commit"]) >= 7 and "model.hidden_size" in reference.facts
        steps = np.diff(reference.columns["step"], prepend=0)
        assert steps.sum() == int(reference.facts["train.train_steps"]), "a whole run"
        assert steps.min() >= np.median(steps) / 2, "no row of a few samples"


def test_seeds_of_one_configuration_are_a_band(tmp_path: Path) -> None:
    files = [
        write_curve(tmp_path, "arm-1", [5, 4, 3], with_seed(1)),
        write_curve(tmp_path, "arm-2", [7, 6, 5], with_seed(2)),
        write_curve(tmp_path, "arm-3", [6, 5, 2, 1], with_seed(3)),
        write_curve(tmp_path, "wide", [1, 1], with_seed(1, hidden_size=1536)),
    ]
    arm, wide = bands(map(str, files))
    assert (arm.label, wide.label) == ("arm, 3 seeds", "wide")
    tokens, curves = arm.curve("aux_loss")
    # Lines of 50 tokens are wider than windows here; the first one's mean of log(tokens) is log(50) - 1.
    np.testing.assert_allclose(tokens, [50 / np.e, 200 / np.e, 50 * 27 / 4 / np.e], rtol=1e-6)
    np.testing.assert_allclose(curves, [[5, 4, 2], [6, 5, 3], [7, 6, 5]], atol=1e-12)
    assert arm.curve("clm_loss") is None


def line_means(ends: np.ndarray) -> np.ndarray:
    """Of 9 - log(tokens) over lines that end there."""
    integral = 10 * ends - ends * np.log(ends)
    return np.diff(integral, prepend=0.0) / np.diff(ends, prepend=0.0)


@pytest.mark.parametrize(
    ("interval", "until"), [(1000, 3e6), (1000, 1e5), (1000, 1e4), (7000, 3e6), (50_000, 3e6), (20_000, 2e7)]
)
def test_a_run_lies_on_the_reference_whenever_it_ends_and_logs(interval: int, until: float) -> None:
    """The same course, straight in log(tokens), cut short, longer and at other intervals."""
    rows = np.arange(15_000.0, 3e6, 15_000)
    at, curves = Band([Reference("r", {"seed": "1"}, {"tokens": rows, "x": line_means(rows)})]).curve("x")
    np.testing.assert_allclose(curves, [9 - np.log(at)] * 3, atol=1e-9)
    ends = np.arange(interval, until, interval, dtype=float)
    values = line_means(ends)
    values[3] = np.nan
    tokens, means = over_tokens(ends, values)
    np.testing.assert_allclose(means, 9 - np.log(tokens), atol=1e-9)


def test_what_was_seen_so_far_does_not_change_while_a_run_goes_on() -> None:
    random = np.random.default_rng(0)
    ends = np.cumsum(random.uniform(900, 1100, 2000))
    values = 9 - np.log(ends) + random.standard_normal(2000)
    whole, part = over_tokens(ends, values), over_tokens(ends[:150], values[:150])
    np.testing.assert_allclose([one[1:150] for one in whole], [one[1:] for one in part], rtol=1e-9)
    assert np.std(whole[1][1000:] - 9 + np.log(whole[0][1000:])) < 0.1, "noise is averaged away"


def test_runs_that_log_at_other_steps_are_read_between_their_rows() -> None:
    def reference(name: str, ends: list[float], values: list[float]) -> Reference:
        return Reference(name, {"seed": "1"}, {"tokens": np.array(ends), "x": np.array(values)})

    fine = reference("a", [100.0, 200.0, 300.0, 400.0], [0.0, 10.0, 20.0, 30.0])
    tokens, curves = Band([fine, reference("b", [130.0, 260.0, 390.0], [1.0, 1.0, 1.0])]).curve("x")
    last = 1.5**3 * 260 / np.e  # of the line from 260 to 390
    assert tokens[[0, -1]].tolist() == pytest.approx([130 / np.e, last]), "where both have been"
    assert np.interp(1.5**2 * 300 / np.e, tokens, curves[2]) == pytest.approx(20, abs=0.1)
    assert Band([fine, reference("c", [50.0, 150.0], [3.0, np.nan])]).curve("x")[0].size == 0


def test_the_picture_has_the_reference_beneath(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [5, 4, 3])
    curve = tmp_path / "arm-1.csv"
    tool.main(tool.Options([str(run)], str(curve), commit="abc"))
    assert f"--reference {curve}" in capsys.readouterr().out
    other = write_curve(tmp_path, "arm-2", [6, 5, 4], with_seed(2))
    picture = tmp_path / "x.svg"
    tool.main(tool.Options([str(run)], str(picture), reference=[str(curve), str(other), "metro"]))
    assert "without" not in capsys.readouterr().out
    shown = picture.read_text()
    assert "<!-- arm, 2 seeds: MLM -->" in shown and "<!-- metro, 2 seeds: MLM -->" in shown
    assert "<!-- tokens -->" in shown and "<!-- metro, 2 seeds: CLM -->" not in shown
    assert Run.read(run).tokens_at([0.5, 2.5, 3]) == [25, 125, 150]


def test_figures_that_no_reference_has_are_named_with_those_that_have_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "pretraining", [5, 4, 3])
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace("aux_loss", "mlm_loss"))
    tool.main(tool.Options([str(run)], str(tmp_path / "x.svg"), reference=["metro", "electra"]))
    line, made = capsys.readouterr().out.splitlines()
    assert line == "metro, 2 seeds, electra, 2 seeds: without mlm_loss; --reference has them as mlm_15, mlm_30"
    assert made.endswith(f"{tmp_path.name}/pretraining to step 3")
    (run / "metrics.jsonl").write_text(text.replace("consumed_tokens", "tokens"))
    for output, names in (("x.svg", ["metro"]), ("x.csv", [])):
        with pytest.raises(UserError, match=f"{tmp_path.name}/pretraining: .* has no consumed_tokens"):
            tool.main(tool.Options([str(run)], str(tmp_path / output), reference=names))


def test_mistakes(tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "run", [5, 4]))
    for options, message in (
        (
            tool.Options([run], "x.png", reference=["metroo"]),
            "--reference metroo: .*there are .*electra, .*metro, mlm_15",
        ),
        (tool.Options([run, run], "x.csv"), "a .csv holds the curves of one run"),
        (tool.Options([run], "x.png", commit="abc"), "--commit abc: is for the head of a .csv"),
    ):
        with pytest.raises(UserError, match=message):
            tool.main(options)
    bad = tmp_path / "bad.csv"
    for text in (
        "",
        "# name: a\nstep,tokens\n1,2\n",
        "# name: a\n# seed: 1\n# commit: b\nstep,x\n1,2\n",
        "step\n1,2\n",
    ):
        bad.write_text(text)
        with pytest.raises(UserError, match="bad.csv: no reference curve"):
            Reference.read(bad)
    bad.write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match="bad.csv: no reference curve"):
        Reference.read(bad)
    (tmp_path / "run" / "run_config.yaml").unlink()
    with pytest.raises(UserError, match="has no run_config.yaml"):
        Reference.of(Run.read(tmp_path / "run"), "x", "")
