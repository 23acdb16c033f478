import re
import subprocess
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from metro_megatron.cli.options import flatten
from metro_megatron.config.file import parse_config, preset_names
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError

EXAMPLES = Path(__file__).parents[1] / "examples"
PRESETS = sorted(EXAMPLES.glob("*.yaml"))
BASELINE = EXAMPLES / "ablations" / "baseline.yaml"

# METRO Tables 3 and 13: H, F, heads, main layers, auxiliary layers, buckets, distance, lr, warm-up, clip, steps.
PAPER = {
    "base": (768, 3072, 12, 12, 4, 64, 128, 5e-4, 10000, 2.0, 125000),
    "base_pp": (768, 3072, 12, 12, 4, 64, 128, 1.75e-4, 10000, 2.0, 1950000),
    "large_pp": (1024, 4096, 16, 24, 6, 128, 256, 1e-4, 10000, 2.0, 1950000),
    "xl": (1536, 6144, 24, 48, 8, 512, 512, 5e-5, 30000, 1.0, 1950000),
    "xxl": (2560, 10240, 40, 64, 8, 512, 512, 3e-5, 30000, 1.0, 1950000),
}

# METRO Table 2: what a row's file changes, as it stands in the file: of the baseline, or in Combo of the row before.
BASELINE_CHANGES = {
    "model.relative_attention_num_buckets": 32,
    "model.reset_cls": False,
    "model.shared_embeddings": "token_position",
    "model.auxiliary_dropout": "eval",
    "objective.main": ["rtd"],
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "replace_mlm": {"objective.main": ["clm"], "model.shared_lm_bias": True},
    "one_choice_cloze": {"objective.main": ["cloze"]},
    "clm": {"objective.main": ["rtd", "clm"], "objective.clm": "weighted", "model.shared_lm_bias": True},
    "rtd_scl": {"objective.main": ["rtd", "scl"]},
    "pre_layernorm": {"model.norm_first": True},
    "relative_64": {"model.relative_attention_num_buckets": 64},
    "tupe": {"model.untied_positions": True, "model.reset_cls": True, "model.shared_embeddings": "token"},
    "coco_lm": {
        "objective.main": ["rtd", "clm", "scl"],
        "objective.clm": "weighted",
        "model.vocab_size": 64000,
        "model.shared_embeddings": "token_position_norm",
    },
}
COMBO: dict[str, dict[str, Any]] = {
    "combo_1_clm_zero_dropout": {**ABLATIONS["clm"], "model.auxiliary_dropout": "zero"},
    "combo_2_relative_64": {"model.relative_attention_num_buckets": 64},
    "combo_3_reset_cls": {"model.reset_cls": True},
    "combo_4_simplified_clm": {"objective.clm": "simplified"},
    "combo_5_constrained_sharing": {"model.shared_embeddings": "token", "model.shared_lm_bias": False},
}

# METRO Figure 3: lr, clip, scaled initialization.
FIGURE_3 = {
    "lr_1e-4_clip_2": (1e-4, 2.0, "none"),
    "lr_2e-5_clip_2": (2e-5, 2.0, "none"),
    "lr_1e-4_clip_1": (1e-4, 1.0, "none"),
    "lr_1e-4_clip_1_scaled_init": (1e-4, 1.0, "ffn"),
}

# What an arm of the campaign changes of METRO's, which changes none of the defaults.
CAMPAIGN: dict[str, dict[str, Any]] = {
    "metro": {},
    "electra": {"model.reset_cls": False, "model.shared_embeddings": "token_position", "objective.main": ["rtd"]},
    "mlm_15": {"model.lm_head": "dense", "objective.main": ["mlm"], "corruption.source": "none"},
}
CAMPAIGN["mlm_30"] = {**CAMPAIGN["mlm_15"], "objective.mask_probability": 0.3}
CAMPAIGN["random_weights"] = {}
CAMPAIGN["uniform"] = {"corruption.source": "uniform"}
CAMPAIGN["early_exit"] = {"early_exit.layers": [2], "early_exit.share": "0 -> 0 at 50% -> 0.5 at 50%"}
CAMPAIGN["fast_electra"] = {
    "objective.main": ["rtd"],
    "corruption.source": "frozen",
    "corruption.frozen_model": "runs/campaign/AUXILIARY",
    "corruption.temperature_schedule": "exponential",
    "corruption.temperature": 2.0,
}


def load(*paths: Path) -> Config:
    return parse_config(["--config", *map(str, paths), "--data.train", "shard", "--train.output", "run"])


def processes(path: Path) -> int:
    stated = re.search(r"^# Processes: (\d+)$", path.read_text(), re.MULTILINE)
    assert stated, "state the number of processes in a comment"
    return int(stated.group(1))


def changes(config: Config, before: Config) -> dict[str, Any]:
    """Options of `config` with another value than `before` has."""
    old = flatten(before)
    return {name: value for name, value in flatten(config).items() if value != old[name]}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_has_no_problems_on_its_number_of_processes(path):
    assert problems(load(path), processes(path)) == []


@pytest.mark.parametrize(("name", "expected"), PAPER.items(), ids=PAPER)
def test_the_paper_s_sizes(name, expected):
    config = load(EXAMPLES / f"{name}.yaml")
    model, optimizer, train = config.model, config.optimizer, config.train
    assert expected == (
        model.hidden_size,
        model.ffn_hidden_size,
        model.num_attention_heads,
        model.num_layers,
        model.auxiliary_num_layers,
        model.relative_attention_num_buckets,
        model.relative_attention_max_distance,
        optimizer.lr,
        optimizer.lr_warmup_steps,
        optimizer.clip_grad,
        train.train_steps,
    )
    assert model.hidden_size == 64 * model.num_attention_heads
    assert (config.data.seq_length, train.global_batch_size, config.objective.rtd_weight) == (512, 2048, 50)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.98, 1e-6)
    assert (model.hidden_dropout, model.attention_dropout, optimizer.weight_decay) == (0.1, 0.1, 0.01)


# ELECTRA's Table 6 and its authors' configure_pretraining.py: of main and generator layers, H, heads, F; width of the
# embeddings, samples of how many tokens, lr, steps.
ELECTRA = {
    "electra_small": ((12, 256, 4, 1024), (12, 64, 1, 256), 128, 128, 128, 5e-4, 1_000_000),
    "electra_base": ((12, 768, 12, 3072), (12, 256, 4, 1024), 768, 256, 512, 2e-4, 766_000),
}


@pytest.mark.parametrize(("name", "expected"), ELECTRA.items(), ids=ELECTRA)
def test_electra_s_sizes(name, expected):
    config = load(EXAMPLES / f"{name}.yaml")
    model, objective, optimizer, train = config.model, config.objective, config.optimizer, config.train
    main, generator = astuple(model.main), astuple(model.auxiliary)
    batch, length = train.global_batch_size, config.data.seq_length
    assert (main, generator, model.table_width, batch, length, optimizer.lr, train.train_steps) == expected
    assert (objective.main, objective.mask_probability, objective.keep_probability) == (["rtd"], 0.15, 0.15)
    assert (optimizer.lr_warmup_steps, optimizer.weight_decay, optimizer.decay_all) == (10000, 0.01, False)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.999, 1e-6)
    assert (optimizer.clip_grad, objective.rtd_weight, model.layer_norm_eps) == (1.0, 50, 1e-12)


def test_each_row_of_table_2_changes_what_the_table_names():
    base = load(EXAMPLES / "base.yaml")
    baseline = load(EXAMPLES / "base.yaml", BASELINE)
    assert changes(baseline, base) == BASELINE_CHANGES
    assert sorted(path.stem for path in BASELINE.parent.iterdir()) == sorted(["baseline", *ABLATIONS, *COMBO])
    before = baseline
    for name, expected in [*ABLATIONS.items(), *COMBO.items()]:
        path = BASELINE.with_stem(name)
        config = load(EXAMPLES / "base.yaml", BASELINE, path)
        assert problems(config, processes(path)) == []
        assert changes(config, before if name in COMBO else baseline) == expected, name
        before = config if name in COMBO else before
    assert before == base


def test_the_arms_of_figure_3():
    xl, miniature = EXAMPLES / "xl.yaml", EXAMPLES / "figure3" / "miniature.yaml"
    names = ("optimizer.lr", "optimizer.clip_grad", "model.scaled_init_targets")
    for name, expected in FIGURE_3.items():
        path = miniature.with_stem(name)
        config = load(xl, path)
        assert problems(config, processes(path)) == []
        assert problems(load(miniature, path), processes(miniature)) == []
        assert tuple(flatten(config)[name] for name in names) == expected
        assert changes(config, load(xl)).keys() <= set(names)


def test_the_arms_of_the_campaign():
    common = EXAMPLES / "campaign" / "common.yaml"
    assert sorted(path.stem for path in common.parent.glob("*.yaml")) == sorted(["common", "gpu", *CAMPAIGN])
    for name, expected in CAMPAIGN.items():
        config = load(common, common.with_stem(name))
        assert problems(config, processes(common)) == []
        assert changes(config, load(common)) == expected
        gpu = common.with_stem("gpu")
        assert problems(load(common, gpu, common.with_stem(name)), processes(gpu)) == []
    sizes = [load(path).model.main for path in (common, EXAMPLES / "demo.yaml")]
    assert sizes[0] == sizes[1]


def test_one_change_at_a_time_to_metro_in_the_campaign():
    common, metro = (EXAMPLES / "campaign" / f"{name}.yaml" for name in ("common", "metro"))
    files = sorted((EXAMPLES / "campaign" / "one_change").iterdir())
    assert {path.stem: changes(load(common, path, metro), load(common, metro)) for path in files} == {
        "auxiliary_depth": {"model.auxiliary_num_layers": 2},
        "auxiliary_rate": {"optimizer.auxiliary_lr": 2e-3},
        "lambda_3": {"objective.rtd_weight": 3.0},
        "lambda_50": {"objective.rtd_weight": 50.0},
    }


def test_presets_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert preset_names() == [path.stem for path in PRESETS]
    for path in PRESETS:
        assert parse_config(["--config", path.stem]) == parse_config(["--config", str(path)])
    (tmp_path / "base").write_text("train: {seed: 7}")
    assert parse_config(["--config", "base"]).train.seed == 7
    with pytest.raises(UserError) as caught:
        parse_config(["--config", "bsae", "xl", "nowhere.yaml", "none/xl"])
    assert caught.value.problems == [
        f"--config bsae: no such file, and no preset either; there are {', '.join(preset_names())}",
        "nowhere.yaml: no such file or folder; check the path",
        "none/xl: no such file or folder; check the path",
    ]


def test_help_names_the_presets(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    shown = re.search(r"presets \(([\w, ]+)\)", " ".join(capsys.readouterr().out.split()))
    assert shown and sorted(shown[1].split(", ")) == preset_names()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_a_launcher_is_sound_shell(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.stat().st_mode & 0o111
