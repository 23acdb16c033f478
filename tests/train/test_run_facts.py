"""What a run's folder tells of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from metro_megatron.config.schema import Config, DataConfig, ModelConfig, Phase, TrainConfig
from metro_megatron.plan.flops import Amount, model_flops
from metro_megatron.train.run_facts import changed_options, curve, data_rows, run_flops, run_sections

MODEL = ModelConfig(hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, num_layers=2, vocab_size=300)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(train=["/data/news", "/data/books"], weights=[1.0, 3.0], seq_length=64),
    train=TrainConfig(train_steps=40, seed=5, phases=[Phase(start="30", seq_length=128)]),
)


def line(step: int) -> dict[str, float]:
    """40 samples a step, of 20 tokens up to step 30, then 80."""
    late = max(0, step - 30)
    tokens = 40 * (20 * (step - late) + 80 * late)
    return {"step": step, "consumed_samples": 40 * step, "consumed_tokens": tokens, "loss": 9.0, "rtd_loss": 40 - step}


def test_flops_are_summed_by_phase_and_length() -> None:
    early, late = (replace(CONFIG.by_phase[i]) for i in (0, 1))
    expected = model_flops(early, Amount.of_samples(1200, 20)) + model_flops(late, Amount.of_samples(400, 80))
    assert run_flops(CONFIG, [line(step) for step in range(10, 41, 10)]) == pytest.approx(expected, rel=1e-12)
    # The last line again, as progress.json has it, adds nothing.
    assert run_flops(CONFIG, [line(30), line(40), line(40)]) == pytest.approx(expected, rel=1e-12)


def test_sections_of_a_run_s_checkpoint(tmp_path: Path) -> None:
    iteration = tmp_path / "iter_0000020"
    iteration.mkdir()
    lines = "".join(json.dumps(line(step)) + "\n" for step in (10, 20, 30))
    (tmp_path / "metrics.jsonl").write_text(lines)
    progress = {"step": 20, "consumed_samples": 800, "seen_tokens": 16000, "skipped_steps": 1, "data": ["x"]}
    (iteration / "progress.json").write_text(json.dumps(progress))
    sections = run_sections(iteration, CONFIG)
    cost = model_flops(CONFIG.by_phase[0], Amount.of_samples(800, 20))
    assert sections["pretraining"] == {
        "step": 20, "consumed samples": 800, "seen tokens": 16000, "skipped steps": 1, "flops": pytest.approx(cost),
    }  # fmt: skip
    assert sections["training curve"] == [
        {"step": step, "tokens": 800 * step, "loss": 9.0, "rtd_loss": 40 - step} for step in (10, 20)
    ]
    for more, flops in (({"branch": {"step": 10}}, None), ({"branch": {"step": 10}, "flops": 7.5}, 7.5)):
        (iteration / "progress.json").write_text(json.dumps({**progress, **more}))
        assert run_sections(iteration, CONFIG)["pretraining"].get("flops") == flops  # type: ignore[attr-defined]
    (iteration / "progress.json").unlink()
    assert "pretraining" not in run_sections(iteration, CONFIG)


def test_a_curve_is_short_and_ends_where_the_run_does() -> None:
    steps = [point["step"] for point in curve([line(step) for step in range(1, 38)])]
    assert len(steps) == 10 and steps[-1] == 37 and steps == sorted(set(steps))
    assert curve([]) == []


def test_options_say_what_the_run_was_and_not_where() -> None:
    changed = changed_options(CONFIG)
    assert changed["model.hidden_size"] == 32 and changed["data.weights"] == [1.0, 3.0] and changed["train.seed"] == 5
    assert not changed.keys() & {"data.train", "train.output", "model.norm_first", "parallel.tensor_parallel"}


def test_a_source_whose_manifest_is_gone_keeps_its_name() -> None:
    rows = data_rows(CONFIG)
    assert [(row["dataset"], row["weight"], row["tokens"]) for row in rows] == [("news", 1.0, ""), ("books", 3.0, "")]
