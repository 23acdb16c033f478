import ast
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from metro_megatron.cli.options import flatten, options_of, type_name
from metro_megatron.config.file import dump_config, load_config, parse_config, preset_names, save_config
from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import Config, DataConfig, OptimizerConfig, TrainConfig
from metro_megatron.errors import UserError

ROOT = Path(__file__).parents[2]
UNUSUAL = Config(
    data=DataConfig(train=["runs/a b", "c: d", "1e4", "ü#"], validation_fraction=1e-7),
    optimizer=OptimizerConfig(lr=1e-5, decay_all=True),
    train=TrainConfig(output="null", seed=2**62, precision="fp16"),
)


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


def found(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_config(argv)
    return caught.value.problems


def test_later_files_override_and_options_override_files(write):
    first = write("optimizer: {lr: 1e-4, lr_warmup_steps: 7}\ndata: {train: [x]}\n")
    second = write("optimizer:\n  lr: 2e-4\ntrain:\n", "b.yaml")
    config = parse_config(["--config", first, second, "--data.train", "A", "B", "--train.output", "out"])
    assert (config.optimizer.lr, config.optimizer.lr_warmup_steps) == (2e-4, 7)
    assert (config.data.train, config.train.output) == (["A", "B"], "out")
    before, after = flatten(Config()), flatten(config)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"optimizer.lr", "optimizer.lr_warmup_steps", "data.train", "train.output"}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", '"1e-4"'])
def test_yaml_floats_without_a_point(write, text):
    assert load_config(Path(write(f"optimizer: {{lr: {text}}}"))).optimizer.lr == 1e-4


@pytest.mark.parametrize("config", [Config(), UNUSUAL])
def test_dump_and_load_are_inverse(tmp_path, config):
    save_config(config, tmp_path / "run_config.yaml")
    assert load_config(tmp_path / "run_config.yaml") == config
    assert yaml.safe_load(dump_config(config))["optimizer"]["lr"] == config.optimizer.lr
    assert [path.name for path in tmp_path.iterdir()] == ["run_config.yaml"]


def test_an_empty_file_is_the_defaults(write):
    assert parse_config(["--config", write("")]) == Config() == parse_config([])


def test_all_problems_of_all_places_at_once(write):
    path = write(
        "model:\n  hiden_size: 768\n  num_layers: twelve\noptimiser: {lr: 3}\nlr: 3\ndata:\n  train: runs/a\n"
        "train:\n  output: 2024\n  seed: 1e4\n  train_steps: true\n  precision: fp8\ncheckpoint: 3\n"
    )
    assert found("--train.otput", "x", "--config", path, "nowhere.yaml") == [
        "--train.otput: no such option; did you mean --train.output?",
        f"{path}: model.hiden_size: no such key; did you mean model.hidden_size?",
        f"{path}: model.num_layers: expected int, got 'twelve'",
        f"{path}: optimiser: no such section; did you mean optimizer?",
        f"{path}: lr: no such section; did you mean optimizer.lr?",
        f"{path}: data.train: expected list of str, got 'runs/a'; write [runs/a]",
        f"{path}: train.output: expected str, got 2024; write it in quotes: '2024'",
        f"{path}: train.seed: expected int, got '1e4'; write 10000",
        f"{path}: train.train_steps: expected int, got true",
        f"{path}: train.precision: expected one of bf16, fp16, fp32, got 'fp8'",
        f"{path}: checkpoint: expected keys and values, got 3",
        "nowhere.yaml: no such file or folder; check the path",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "expected sections (model, objective"),
        ("model: {num_layers: 3\n", "not valid YAML"),
        ("model: {num_layers: 3, num_layers: 4}\n", "num_layers is given twice"),
        ("model: {}\nmodel: {}\n", "model is given twice"),
        ("model: {? [1] : 2}\n", "not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("model:\n  num_layers:\n", "expected int, got nothing"),
        ("model:\n  num_layers: {a: 1}\n", "expected int, got {'a': 1}"),
        ("data:\n  train: [1, a]\n", "expected list of str"),
        ("data:\n  train: [[a]]\n", "expected list of str"),
        ("data:\n  train: [null]\n", "expected list of str"),
        ("3: 4\n", "3: no such section"),
        ("model: {3: 4}\n", "model.3: no such key"),
    ],
)
def test_hostile_yaml(write, text, expected):
    problems = found("--config", write(text))
    assert len(problems) == 1 and expected in problems[0], problems


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00model")
    assert "not valid YAML in UTF-8" in found("--config", str(tmp_path / "a.yaml"))[0]
    assert "is a folder" in found("--config", str(tmp_path))[0]


def test_an_interrupted_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "run_config.yaml"
    save_config(Config(), path)
    broken = replace(Config(), train=TrainConfig(output=object()))  # type: ignore[arg-type]
    with pytest.raises(yaml.YAMLError):
        save_config(broken, path)
    assert load_config(path) == Config() and [one.name for one in tmp_path.iterdir()] == [path.name]


def test_print_config_prints_what_load_reads(capsys, write):
    with pytest.raises(SystemExit) as caught:
        parse_config(["--print_config", "--optimizer.lr", "3e-5"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "  # Peak learning rate.\n  lr: 3.0e-05\n" in text
    assert load_config(Path(write(text))) == replace(Config(), optimizer=OptimizerConfig(lr=3e-5))


@pytest.mark.parametrize(
    ("name", "given", "others"),
    [
        ("optimizer.lr_decay_steps", "150%", []),
        ("optimizer.auxiliary_lr_schedule", "often", []),
        ("early_exit.share", "often", ["--early_exit.layers", "1"]),
        ("phase 1 of train.phases: start", "often", []),
    ],
)
def test_print_config_prints_a_schedule_that_is_none_beside_other_mistakes(capsys, name, given, others):
    value = [f"--{name}", given] if "phase" not in name else ["--train.phases", "{start: often}"]
    with pytest.raises(UserError) as caught:
        parse_config(["--print_config", "--parallel.tensor_model_parallel_size", "5", *value, *others])
    assert given in capsys.readouterr().out
    found = caught.value.problems
    assert any(one.startswith(name) for one in found) and any("tensor_model_parallel_size" in one for one in found), (
        found
    )


def test_print_config_prints_what_no_run_can_have_and_names_it(capsys, write):
    options = ["--optimizer.lr_warmup_steps", "9", "--train.train_steps", "5", "--corruption.temperature", "-1"]
    for given, part in ((options[:4], "optimizer.lr_warmup_steps is 9, more than"), (options, "temperature is -1")):
        with pytest.raises(UserError) as caught:
            parse_config(["--print_config", "--parallel.tensor_model_parallel_size", "4", *given])
        assert len(caught.value.problems) == 1 and part in caught.value.problems[0]
        assert load_config(Path(write(capsys.readouterr().out))).optimizer.lr_warmup_steps == 9
    # Paths are not missed, nor are processes; a preset is printed as it is.
    for name in preset_names():
        with pytest.raises(SystemExit) as done:
            parse_config(["--print_config", "--config", name])
        assert done.value.code == 0, name


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in (option.name for option in options_of(Config)):
        after = text.partition(f" --{name} ")[2].partition(" --")[0]
        assert "(type: " in after and len(after.partition("(type: ")[0].split()) >= 3, name


def test_runs_of_earlier_releases_held_out_by_place(tmp_path: Path) -> None:
    """What their run_config.yaml does not say."""
    for fraction, expected in ((0.1, "place"), (0.0, "content")):
        text = dump_config(replace(Config(), data=DataConfig(validation_fraction=fraction)))
        earlier = "".join(line for line in text.splitlines(keepends=True) if "held_out_by: " not in line)
        (tmp_path / "run_config.yaml").write_text(earlier)
        (tmp_path / "mine.yaml").write_text(earlier)
        assert load_config(tmp_path / "run_config.yaml").data.held_out_by == expected
        assert load_config(tmp_path / "mine.yaml").data.held_out_by == "content"


def test_the_option_surface_is_the_golden_list():
    """A new option needs a line in tests/golden/options.txt, and an argument why it must exist."""
    surface = [f"{one.name}: {type_name(one.annotation)} = {one.default!r}" for one in options_of(Config)]
    assert surface == (ROOT / "tests/golden/options.txt").read_text().splitlines()


def test_every_field_is_read_somewhere():
    """An option that nothing reads would be a promise not kept."""
    own = [ROOT / "metro_megatron/config" / name for name in ("file.py", "problems.py")]
    read: set[str] = set()
    for path in [*(ROOT / "metro_megatron").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *ROOT.glob("*.py")]:
        if path not in own:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    unread = [option.name for option in options_of(Config) if option.leaf not in read]
    assert not unread


def test_phases_come_from_files_and_command_lines_and_are_printed_as_they_read(write):
    """A record of each; what it leaves out has its default, and is left out when printed."""
    expected = [Phase("90%", seq_length=128, weights=[1.0, 0.0]), Phase(95000, mask_probability=0.2, lr_factor=0.5)]
    path = write(
        "train: {phases: [{start: 90%, seq_length: 128, weights: [1, 0]}, "
        "{start: 95000, mask_probability: 0.2, lr_factor: 0.5}]}"
    )
    ways = [
        ["--config", str(path)],
        [
            *("--train.phases", "{start: 90%, seq_length: 128, weights: [1, 0]}"),
            "{start: 95000, mask_probability: 0.2, lr_factor: 0.5}",
        ],
    ]
    for way in ways:
        config = parse_config([*way, "--train.train_steps", "100000"])
        assert config.train.phases == expected
    text = dump_config(config)
    assert "  phases: [{start: 90%, seq_length: 128, weights: [1.0, 0.0]}, {start: 95000," in text
    assert "  # mask probability: 0.15 -> 0.15 at step 95,000 -> 0.2 at step 95,000\n" in text
    assert "  # seq length: 512 -> 512 at step 90,000 -> 128 at step 90,000 -> 128 at step 95,000 -> 512 at" in text
    assert "  # lr factor: 1 -> 1 at step 95,000 -> 0.5 at step 95,000\n" in text
    assert load_config(Path(write(text))) == config


def test_every_mistake_in_a_phase_is_named(write):
    with pytest.raises(UserError) as caught:
        parse_config(["--train.phases", "{sequence_length: 128, lr_factor: high}", "--train.phases", "{start"])
    first, second = caught.value.problems
    assert first == (
        "--train.phases: sequence_length: no such key; did you mean seq_length?; "
        "lr_factor: expected float, got 'high'; start: missing"
    )
    assert second.startswith(
        "--train.phases: expected list of {start, seq_length, weights, mask_probability, lr_factor}"
    )
