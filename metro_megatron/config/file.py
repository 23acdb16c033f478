"""Configuration from YAML files and a command line, and back to YAML."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import docstring_parser
import yaml

from metro_megatron.cli.command_line import describe_os_error
from metro_megatron.cli.options import HELP, Described, help_parser, parse_value, read_options, suggestion
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.files import replace_text

_CONFIG = Described("config", list[str], None, "YAML files; a later one overrides an earlier one")
_PRINT = Described("print_config", bool, False, "print the resolved configuration as YAML and exit")
_DESCRIPTION = "Pretrain a METRO-LM: one process per GPU, started by torchrun; an existing run is resumed."
_USAGE = "torchrun --nproc-per-node GPUS pretrain_metro.py [--config YAML...] [--section.name VALUE...]"


def parse_config(argv: Sequence[str]) -> Config:
    """Defaults, then the files of `--config`, then options (`--optimizer.lr 1e-4`, `--data.train A B`).

    Raises UserError with every unknown key, wrong type and unreadable file found. `--help` and
    `--print_config` print and exit 0.
    """
    if any(token in HELP for token in argv):
        _help()
        sys.exit(0)
    options = read_options(argv, {_CONFIG.name: list[str], _PRINT.name: bool, **leaf_types()})
    problems = options.problems
    paths = options.values.pop(_CONFIG.name, [])
    print_only = options.values.pop(_PRINT.name, False)
    values: dict[str, Any] = {}
    for path in paths:
        try:
            values |= _read_yaml(Path(path))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)
    config = _with_values(Config(), values | options.values)
    if print_only:
        print(dump_config(config), end="")
        sys.exit(0)
    return config


def load_config(path: Path) -> Config:
    """The configuration in one YAML file; what it leaves out has its default. Raises UserError."""
    return _with_values(Config(), _read_yaml(path))


def save_config(config: Config, path: Path) -> None:
    """Write `dump_config(config)` to `path` in one piece: readers see the old file or the new one."""
    replace_text(path, dump_config(config))


def dump_config(config: Config) -> str:
    """YAML of every field, each under a comment that says what it is; `load_config` reads it back equal."""
    lines: list[str] = []
    for section, values in _sections(config):
        lines += [f"# {_docs(type(values))['']}", f"{section}:"]
        texts = _docs(type(values))
        for one in fields(values):
            # PyYAML ends a bare scalar with a document marker.
            value = yaml.safe_dump(
                getattr(values, one.name), default_flow_style=True, allow_unicode=True, width=10**9
            ).removesuffix("...\n")
            lines += [f"  # {texts[one.name]}", f"  {one.name}: {value.strip()}"]
        lines.append("")
    return "\n".join(lines)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by dotted name: (value in `old`, value in `new`)."""
    before, after = flatten(old), flatten(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf by its dotted name, in order."""
    return {
        f"{section}.{one.name}": getattr(values, one.name)
        for section, values in _sections(config)
        for one in fields(values)
    }


def leaf_types() -> dict[str, Any]:
    """The type of every leaf by its dotted name, in order."""
    return {
        f"{section}.{name}": annotation
        for section, values in _sections(Config())
        for name, annotation in get_type_hints(type(values)).items()
    }


class _StrictLoader(yaml.SafeLoader):
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
    known = leaf_types()
    for name, raw in _leaves(tree, path, problems):
        if name not in known:
            problems.append(f"{path}: {name}: no such key{suggestion(name, known)}")
            continue
        try:
            values[name] = parse_value(raw, known[name])
        except UserError as error:
            problems.append(f"{path}: {name}: {error}")
    if problems:
        raise UserError(problems)
    return values


def _leaves(tree: Any, path: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    sections = dict(_sections(Config()))
    if not isinstance(tree, Mapping | None):
        problems.append(f"{path}: expected sections ({', '.join(sections)}), got {tree!r}")
        return
    for section, values in (tree or {}).items():
        if section not in sections:
            # Options are known by their last part too: a forgotten section is the usual mistake.
            names = list(sections) if isinstance(values, Mapping) else list(leaf_types())
            problems.append(f"{path}: {section}: no such section{suggestion(str(section), names)}")
        elif not isinstance(values, Mapping | None):
            problems.append(f"{path}: {section}: expected keys and values, got {values!r}")
        else:
            yield from ((f"{section}.{name}", value) for name, value in (values or {}).items())


def _with_values(config: Config, values: Mapping[str, Any]) -> Config:
    for section, old in _sections(config):
        prefix = f"{section}."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        config = replace(config, **{section: replace(old, **own)})
    return config


def _sections(config: Config) -> list[tuple[str, Any]]:
    sections = [(one.name, getattr(config, one.name)) for one in fields(config)]
    assert all(is_dataclass(values) for _, values in sections)
    return sections


def _docs(section: type) -> dict[str, str]:
    """Docstring of every field by name; the class's first sentences under the empty name."""
    parsed = docstring_parser.parse_from_object(section)
    texts = {one.arg_name: " ".join((one.description or "").split()) for one in parsed.params}
    return {"": parsed.short_description or "", **texts}


def _help() -> None:
    groups = {"files": [_CONFIG, _PRINT]}
    types, defaults = leaf_types(), flatten(Config())
    for section, values in _sections(Config()):
        texts = _docs(type(values))
        groups[f"{section}: {texts['']}"] = [
            Described(name, types[name], defaults[name], texts[one.name])
            for one in fields(values)
            for name in [f"{section}.{one.name}"]
        ]
    help_parser(_DESCRIPTION, groups, _USAGE).print_help()
