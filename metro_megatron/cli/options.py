"""What is common to every command line: `--name value...` tokens, typed values, the nearest known name."""

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

import jsonargparse

from metro_megatron.errors import UserError

HELP = ("-h", "--help")


@dataclass
class Options:
    """What a command line gave: values by option name, in order of first appearance, and what was wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_options(argv: Sequence[str], annotations: Mapping[str, Any]) -> Options:
    """Read `--name value`, `--name=value`, `--name a b c` (lists) and bare `--name` (booleans).

    `annotations` maps every known option to its type. A repeated list option appends, any other repeated
    option overrides. Hyphens in names are read as underscores. Nothing is raised: problems are collected.
    """
    options = Options()
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        start = position
        while position < len(argv) and not argv[position].startswith("--"):
            position += 1
        words = list(argv[start:position])
        if not token.startswith("--"):
            stray = " ".join([token, *words])
            options.problems.append(f"{stray}: not an option; every option is written --name value")
            continue
        written, equals, inline = token[2:].partition("=")
        name = written.replace("-", "_")
        if name not in annotations:
            nearest = suggestion(name, annotations, prefix="--")
            options.problems.append(f"--{written}: no such option{nearest}")
            continue
        _take(options, name, ([inline] if equals else []) + words, annotations[name])
    return options


def _take(options: Options, name: str, words: list[str], annotation: Any) -> None:
    if _has_origin(annotation, list):
        is_list = len(words) == 1 and words[0].startswith("[") and words[0].endswith("]")
        raw: Any = words[0] if is_list else words
        if not words:
            options.problems.append(f"--{name}: needs at least one value; an empty list is --{name}=[]")
            return
    elif annotation is bool and not words:
        raw = True
    elif len(words) == 1:
        raw = words[0]
    else:
        given = f"{len(words)} values ({' '.join(words)})" if words else "none"
        options.problems.append(f"--{name}: takes one value ({type_name(annotation)}), got {given}")
        return
    try:
        value = parse_value(raw, annotation)
    except UserError as error:
        options.problems.append(f"--{name}: {error}")
        return
    earlier = options.values.get(name)
    options.values[name] = earlier + value if isinstance(earlier, list) else value


def parse_value(raw: Any, annotation: Any) -> Any:
    """`raw` (a string of a command line, or a value of a YAML file) as `annotation`, by jsonargparse's rules.

    Raises UserError "expected ..., got ...".
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    # jsonargparse takes True for 1, and nothing for any type.
    if isinstance(raw, bool) and annotation is not bool:
        raise UserError(f"expected {type_name(annotation)}, got {str(raw).lower()}")
    if raw is None and type(None) not in get_args(annotation):
        raise UserError(f"expected {type_name(annotation)}, got nothing")
    try:
        return parser.parse_object({"value": raw}).value
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        hint = _type_hint(raw, annotation)
        raise UserError(f"expected {type_name(annotation)}, got {raw!r}{hint}") from error


def _type_hint(raw: Any, annotation: Any) -> str:
    if annotation is str and not isinstance(raw, str | list | dict | None):
        return f"; write it in quotes: '{raw}'"
    if get_origin(annotation) is list and isinstance(raw, str | int | float):
        return f"; write [{raw}]"
    if annotation is int and isinstance(raw, float | str):
        try:
            number = float(raw)
        except ValueError:
            return ""
        return f"; write {int(number)}" if number.is_integer() else "; write a whole number"
    return ""


def type_name(annotation: Any) -> str:
    """A type as a user reads it: `int`, `one of bf16, fp16`, `list of str`."""
    if annotation is type(None):
        return "null"
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if get_origin(annotation) is list:
        return f"list of {type_name(arguments[0])}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(type_name, arguments))
    return {"bool": "true or false", "Path": "path"}.get(annotation.__name__, annotation.__name__)


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean ...?` for the known name nearest to `name`, or an empty string.

    A dotted name is also found by its last part: `lr` suggests `optimizer.lr`.
    """
    known = list(known)
    last = name.rpartition(".")[2]
    by_last = {candidate.rpartition(".")[2]: candidate for candidate in known}
    if last in by_last:
        return f"; did you mean {prefix}{by_last[last]}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    close = close or [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    return f"; did you mean {prefix}{close[0]}?" if close else "; --help lists all of them"


@dataclass(frozen=True)
class Described:
    """One option as help shows it; `default` is REQUIRED where there is none."""

    name: str
    annotation: Any
    default: Any
    text: str


REQUIRED = object()


def help_parser(
    description: str, groups: Mapping[str, Sequence[Described]], usage: str | None = None
) -> jsonargparse.ArgumentParser:
    """A parser that knows how to `print_help()`; `groups` maps headings to options."""
    parser = jsonargparse.ArgumentParser(description=description, usage=usage)
    for heading, described in groups.items():
        group = parser.add_argument_group(heading)
        for option in described:
            settings: dict[str, Any] = {"type": option.annotation, "help": option.text}
            if option.default is REQUIRED:
                settings["required"] = True
            else:
                settings["default"] = option.default
            if _has_origin(option.annotation, list):
                settings |= {"type": str, "nargs": "+", "metavar": option.name.rpartition(".")[2].upper()}
            group.add_argument(f"--{option.name}", **settings)
    return parser


def _has_origin(annotation: Any, origin: type) -> bool:
    return any(get_origin(part) is origin for part in (annotation, *get_args(annotation)))
