"""Configuration from YAML files and a command line, and back to YAML."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from metro_megatron.cli.command_line import describe_os_error
from metro_megatron.cli.options import (
    HELP,
    Option,
    options_of,
    parse_value,
    print_help,
    read_options,
    suggestion,
    with_values,
)
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.files import replace_text

PRESETS = Path(__file__).parents[1] / "presets"
"""Folder of the configurations that come with the package: examples/ of a checkout."""
_DESCRIPTION = "Pretrain a METRO-LM: one process per GPU, started by torchrun; an existing run is resumed."
_OF_RUNS, _HELD_OUT_BY = "run_config.yaml", "data.held_out_by"
"""Runs write all options into their own file: where this one is missing, an earlier release has begun it."""
_USAGE = """torchrun --nproc-per-node GPUS pretrain_metro.py
       [--config YAML...] [--section.name VALUE...]
       rehearsed on this machine, without GPUs: pretrain_metro.py --dry_run --help"""


@dataclass(frozen=True)
class _Files:
    """What a command line has beside the configuration itself."""

    config: list[str] = field(default_factory=list)
    """YAML files or presets (base, base_pp, large_pp, xl, xxl, electra_small, electra_base, demo); a later one
    overrides an earlier one."""
    print_config: bool = False
    """Print the resolved configuration as YAML and exit; with an error for each mistake in it."""


def parse_config(argv: Sequence[str]) -> Config:
    """Defaults, then the files of `--config`, then options (`--optimizer.lr 1e-4`, `--data.train A B`).

    Raises UserError with every unknown key, wrong type and unreadable file found. `--help` and
    `--print_config` print and exit 0; what is printed and could not be run raises UserError, too.
    """
    if any(token in HELP for token in argv):
        _help()
        sys.exit(0)
    given = read_options(argv, {option.name: option for option in [*options_of(_Files), *options_of(Config)]})
    files: _Files = with_values(_Files, given.values)
    values: dict[str, Any] = {}
    for path in files.config:
        try:
            values |= _read_yaml(_file_or_preset(path))
        except UserError as error:
            given.problems.extend(error.problems)
    if given.problems:
        raise UserError(given.problems)
    config: Config = with_values(Config, values | given.values)
    if files.print_config:
        print(dump_config(config), end="", flush=True)
        _check(config)
        sys.exit(0)
    return config


def _check(config: Config) -> None:
    """Raises UserError for what no run can have, on the processes of torchrun or as few as the layout takes."""
    from metro_megatron.config.problems import setting_problems  # has kernels' limits, and so torch

    found = setting_problems(config, int(os.environ.get("WORLD_SIZE", config.parallel.model_ranks)))
    if found:
        raise UserError(found)


def preset_names() -> list[str]:
    """What `--config` takes beside files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _file_or_preset(given: str) -> Path:
    """Raises UserError for a bare name that is neither."""
    path, names = Path(given), preset_names()
    if path.exists() or path.name != given or path.suffix:
        return path
    if given not in names:
        raise UserError(f"--config {given}: no such file, and no preset either; there are {', '.join(names)}")
    return PRESETS / f"{given}.yaml"


def load_config(path: Path) -> Config:
    """The configuration in one YAML file; what it leaves out has its default. Raises UserError."""
    return with_values(Config, _read_yaml(path))


def save_config(config: Config, path: Path) -> None:
    """Write `dump_config(config)` to `path` in one piece: readers see the old file or the new one."""
    replace_text(path, dump_config(config))


def dump_config(config: Config) -> str:
    """YAML of every field, each under a comment that says what it is; `load_config` reads it back equal."""
    lines: list[str] = []
    planned = []
    with suppress(UserError):  # `problems` names the option that is none
        planned = [(name.partition("."), schedule) for name, schedule in config.schedules.items()]
    for section, values in vars(config).items():
        lines += [f"# {type(values).__doc__}", f"{section}:"]
        for option in options_of(type(values)):
            # PyYAML ends a bare scalar with a document marker.
            value = yaml.safe_dump(
                _plain(getattr(values, option.name)),
                default_flow_style=True,
                allow_unicode=True,
                width=10**9,
                sort_keys=False,
            ).removesuffix("...\n")
            lines += [f"  # {option.text}", f"  {option.name}: {value.strip()}"]
        # A dotted name stands in its section, as a comment: it follows from the options there.
        lines += [f"  # {name.replace('_', ' ')}: {one}" for (own, _, name), one in planned if own == section]
        lines.append("")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    """A value as YAML has it; of a record what differs from its defaults."""
    if isinstance(value, list):
        return list(map(_plain, value))
    if not is_dataclass(value):
        return value
    own = {option.name: (getattr(value, option.name), option.default) for option in options_of(type(value))}
    return {name: _plain(one) for name, (one, default) in own.items() if one != default}


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # ten times as fast
    """YAML that refuses a key given twice, of which plain YAML would silently keep the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if str(key) in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    """Typed leaf values of a file by dotted name. Raises UserError with every problem in it."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise UserError(describe_os_error(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML in UTF-8: {' '.join(str(error).split())}") from error
    problems: list[str] = []
    values: dict[str, Any] = {}
    known = {option.name: option for option in options_of(Config)}
    for name, raw in _leaves(tree, path, problems):
        if name not in known:
            problems.append(f"{path}: {name}: no such key{suggestion(name, known)}")
            continue
        try:
            values[name] = parse_value(raw, known[name].annotation)
        except UserError as error:
            problems.append(f"{path}: {name}: {error}")
    if problems:
        raise UserError(problems)
    if path.name == _OF_RUNS and _HELD_OUT_BY not in values:
        values[_HELD_OUT_BY] = "place" if values.get("data.validation_fraction") else "content"
    return values


def _leaves(tree: Any, path: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    sections = [one.name for one in fields(Config)]
    if not isinstance(tree, Mapping | None):
        problems.append(f"{path}: expected sections ({', '.join(sections)}), got {tree!r}")
        return
    for section, values in (tree or {}).items():
        if section not in sections:
            # Options are known by their last part too: a forgotten section is the usual mistake.
            names = sections if isinstance(values, Mapping) else [option.name for option in options_of(Config)]
            problems.append(f"{path}: {section}: no such section{suggestion(str(section), names)}")
        elif not isinstance(values, Mapping | None):
            problems.append(f"{path}: {section}: expected keys and values, got {values!r}")
        else:
            yield from ((f"{section}.{name}", value) for name, value in (values or {}).items())


def _help() -> None:
    groups: dict[str, dict[str, Option]] = {"files": {option.name: option for option in options_of(_Files)}}
    headings = {name: f"{name}: {type(values).__doc__}" for name, values in vars(Config()).items()}
    for option in options_of(Config):
        groups.setdefault(headings[option.name.partition(".")[0]], {})[option.name] = option
    print_help(_DESCRIPTION, groups, _USAGE)
