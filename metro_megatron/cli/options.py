"""Options are the fields of frozen dataclasses: type, default, help, admitted range, all said at the field.

    workers: Annotated[int, at_least(0)] = 0
    '''Processes that read and encode; 0: one for every core.'''

A field without a default is required. A field that is such a dataclass itself stands for all its options. Here is what
every command line has in common: `--name value...` tokens, typed values, the nearest known name, help.
"""

import argparse
import ast
import difflib
import inspect
import math
import shutil
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache, partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from metro_megatron.errors import UserError

T = TypeVar("T")
HELP = ("-h", "--help")
_LONGEST_CHOICES = 72
REQUIRED = object()
"""The default of an option that must be given."""


@dataclass(frozen=True)
class Range:
    """Admitted numbers, `Annotated[int, Range(0, 1)]`; an end that it does not have is not admitted itself."""

    low: float
    high: float = math.inf
    has_low: bool = True
    has_high: bool = False

    def __contains__(self, value: Any) -> bool:
        is_above = value >= self.low if self.has_low else value > self.low
        return is_above and (value <= self.high if self.has_high else value < self.high)

    def refusal(self, value: Any) -> str:
        """What must be of one that it does not contain."""
        limit = "" if math.isfinite(value) else "finite and "
        return f"{value}, must be {limit}{self}"

    def __str__(self) -> str:
        low = f"at least {self.low:g}" if self.has_low else f"greater than {self.low:g}"
        high = f"at most {self.high:g}" if self.has_high else f"less than {self.high:g}"
        return low if self.high == math.inf else f"{low} and {high}"


def at_least(low: float) -> Range:
    return Range(low)


def above(low: float) -> Range:
    return Range(low, has_low=False)


@dataclass(frozen=True)
class Option:
    """A field of an options dataclass, or of one inside it, as a user sees it."""

    name: str
    """The fields that lead to it: `optimizer.lr`."""
    annotation: Any
    """Its type, without the marks of `Annotated`."""
    default: Any
    """REQUIRED where there is none."""
    owner: type
    """The dataclass that it is a field of."""
    marks: tuple[Any, ...] = ()
    """Those of `Annotated`, its own and its group's."""

    @property
    def leaf(self) -> str:
        """Its own name alone, by which tools know it."""
        return self.name.rpartition(".")[2]

    @property
    def text(self) -> str:
        """Its docstring."""
        return field_texts(self.owner)[self.leaf]

    @property
    def range(self) -> Range | None:
        """The admitted numbers, if it is a number."""
        return next((mark for mark in self.marks if isinstance(mark, Range)), None)


def options_of(options_class: type, prefix: str = "", marks: tuple[Any, ...] = ()) -> list[Option]:
    """The options of a dataclass in order; those inside it have dotted names."""
    found: list[Option] = []
    for one, annotation, own in _typed_fields(options_class):
        name = prefix + one.name
        if isinstance(annotation, type) and is_dataclass(annotation):
            found += options_of(annotation, f"{name}.", marks + own)
        else:
            found.append(Option(name, annotation, _default(one), options_class, marks + own))
    return found


def with_values(options_class: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """An instance made of values by dotted name; what is not among them has its default."""
    arguments: dict[str, Any] = {}
    for one, annotation, _ in _typed_fields(options_class):  # type: ignore[arg-type]
        name = prefix + one.name
        if isinstance(annotation, type) and is_dataclass(annotation):
            arguments[one.name] = with_values(annotation, values, f"{name}.")
        elif name in values:
            arguments[one.name] = values[name]
    return options_class(**arguments)


def flatten(options: object) -> dict[str, Any]:
    """The value of every option of an instance by dotted name, in order."""
    return {option.name: attrgetter(option.name)(options) for option in options_of(type(options))}


def out_of_range(known: Mapping[str, Option], values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name is value, must be ...` for every value by dotted name that its option does not admit.

    `known` maps names as they are written, but for a prefix, to options.
    """
    return [
        f"{prefix}{name} is {option.range.refusal(values[option.name])}"
        for name, option in known.items()
        if option.range and option.name in values and values[option.name] not in option.range
    ]


@cache
def field_texts(options_class: type) -> dict[str, str]:
    """Docstring of every field by name, read from the source, where alone it is."""
    texts = dict.fromkeys((one.name for one in fields(options_class)), "")
    owners = [one for one in reversed(options_class.__mro__) if is_dataclass(one)]
    bodies = [ast.parse(textwrap.dedent(inspect.getsource(one))).body[0] for one in owners]
    for one, after in (pair for body in bodies if isinstance(body, ast.ClassDef) for pair in pairwise(body.body)):
        if isinstance(one, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[ast.unparse(one.target)] = " ".join(str(after.value.value).split())
    return texts


@cache
def _typed_fields(options_class: type) -> list[tuple[Field[Any], Any, tuple[Any, ...]]]:
    """Every field with its type and its marks."""
    hints, found = get_type_hints(options_class, include_extras=True), []
    for one in fields(options_class):
        hint = hints[one.name]
        annotation, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        found.append((one, annotation, tuple(marks)))
    return found


def _default(one: Field[Any]) -> Any:
    if one.default_factory is not MISSING:
        return one.default_factory()
    return REQUIRED if one.default is MISSING else one.default


@dataclass
class Given:
    """What a command line gave: values by the options' dotted names, what was wrong, and tokens meant for others."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def read_options(argv: Sequence[str], known: Mapping[str, Option], keep_unknown: bool = False) -> Given:
    """Read `--name value`, `--name=value`, `--name a b c` (lists) and bare `--name` (booleans).

    `known` maps names as they are written to options. A repeated list option appends, any other repeated option
    overrides. Hyphens in names are read as underscores. Nothing is raised: problems are collected. An unknown option is
    one, or with `keep_unknown` handed back with its values.
    """
    given = Given()
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
            given.problems.append(f"{stray}: not an option; every option is written --name value")
            continue
        written, equals, inline = token[2:].partition("=")
        name = written.replace("-", "_")
        if name in known:
            _take(given, name, ([inline] if equals else []) + words, known[name])
        elif keep_unknown:
            given.unknown += [token, *words]
        else:
            given.problems.append(f"--{written}: no such option{suggestion(name, known, prefix='--')}")
    return given


def _take(given: Given, name: str, words: list[str], option: Option) -> None:
    annotation = option.annotation
    if _has_origin(annotation, list):
        is_list = len(words) == 1 and words[0].startswith("[") and words[0].endswith("]")
        raw: Any = words[0] if is_list else words
        if not words:
            given.problems.append(f"--{name}: needs at least one value; an empty list is --{name}=[]")
            return
    elif annotation is bool and not words:
        raw = True
    elif len(words) == 1:
        raw = words[0]
    else:
        several = f"{len(words)} values ({' '.join(words)})" if words else "none"
        given.problems.append(f"--{name}: takes one value ({type_name(annotation)}), got {several}")
        return
    try:
        value = parse_value(raw, annotation)
    except UserError as error:
        given.problems.append(f"--{name}: {error}")
        return
    earlier = given.values.get(option.name)
    given.values[option.name] = earlier + value if isinstance(earlier, list) else value


def parse_value(raw: Any, annotation: Any) -> Any:
    """`raw` (a string of a command line, or a value of a YAML file) as `annotation`.

    Raises UserError "expected ..., got ...", or with what is wrong inside a record.
    """
    try:
        return _converted(raw, annotation)
    except UserError:
        raise
    except (ValueError, KeyError) as error:
        got = "nothing" if raw is None else str(raw).lower() if isinstance(raw, bool) else repr(raw)
        raise UserError(f"expected {type_name(annotation)}, got {got}{_type_hint(raw, annotation)}") from error


def _converted(raw: Any, annotation: Any) -> Any:
    """Raises ValueError or KeyError for what is no `annotation`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _first_that_fits(raw, sorted(arguments, key=lambda one: one is not type(None)))
    if annotation is type(None):
        _require(raw in (None, "null"))
        return None
    if origin is Literal:
        return arguments[arguments.index(raw)]
    if origin is list:
        values = _bracketed(raw) if isinstance(raw, str) else raw
        _require(isinstance(values, list))
        return [_converted(one, arguments[0]) for one in values]
    if is_dataclass(annotation):
        return _record(_bracketed(raw) if isinstance(raw, str) else raw, annotation)
    if annotation is bool:
        return raw if isinstance(raw, bool) else _BOOLEANS[str(raw).lower()]
    if annotation in (str, Path):
        _require(isinstance(raw, str))
    elif isinstance(raw, str):
        _require(math.isfinite(annotation(raw)))
    else:
        _require(isinstance(raw, annotation | int) and not isinstance(raw, bool))
    return annotation(raw)


def _record(raw: Any, kind: Any) -> Any:
    """A dataclass of its fields by name. Raises UserError with every problem in them."""
    _require(isinstance(raw, Mapping))
    known = {option.name: option for option in options_of(kind)}
    found, problems = {}, []
    for name, value in raw.items():
        try:
            found[name] = parse_value(value, known[name].annotation)
        except KeyError:
            problems.append(f"{name}: no such key{suggestion(str(name), known)}")
        except UserError as error:
            problems.append(f"{name}: {error}")
    problems += [f"{one.name}: missing" for one in known.values() if one.default is REQUIRED and one.name not in raw]
    if problems:
        raise UserError("; ".join(problems))
    return kind(**found)


def _first_that_fits(raw: Any, alternatives: Sequence[Any]) -> Any:
    for one in alternatives:
        with suppress(ValueError, KeyError):
            return _converted(raw, one)
    raise ValueError


_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _require(is_right: bool) -> None:
    if not is_right:
        raise ValueError


def _bracketed(text: str) -> Any:
    """The value of `[a, b]` or `{a: 1, b: 2}`."""
    import yaml  # late: benchmarks need no more than torch

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError from error


def _type_hint(raw: Any, annotation: Any) -> str:
    if isinstance(raw, bool):
        return ""
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
        return "one of " + ", ".join(map(_shown, arguments))
    if get_origin(annotation) is list:
        return f"list of {type_name(arguments[0])}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(type_name, arguments))
    if is_dataclass(annotation):
        return "{" + ", ".join(option.name for option in options_of(annotation)) + "}"  # type: ignore[arg-type]
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


def print_help(description: str, groups: Mapping[str, Mapping[str, Option]], usage: str | None = None) -> None:
    """Print the help of a command line; `groups` maps headings to options by their written names.

    It is as wide as the terminal, but below 100 columns.
    """
    width = max(40, min(98, shutil.get_terminal_size().columns - 2))
    parser = argparse.ArgumentParser(
        usage=usage,
        description="\n\n".join(textwrap.fill(" ".join(one.split()), width) for one in description.split("\n\n")),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=width),
    )
    for heading, options in groups.items():
        group = parser.add_argument_group(heading) if heading else parser
        for name, option in options.items():
            group.add_argument(
                f"--{name}",
                required=option.default is REQUIRED,
                nargs="+" if _has_origin(option.annotation, list) else None,
                metavar=_values(option),
                help=_help_text(option),
            )
    parser.print_help()


def _values(option: Option) -> str:
    """What stands for an option's value: its choices where they are few, or its name."""
    if option.annotation is bool:
        return "{true,false}"
    choices = get_args(option.annotation) if get_origin(option.annotation) is Literal else ()
    shown = f"{{{','.join(map(_shown, choices))}}}"
    return shown if choices and len(shown) <= _LONGEST_CHOICES else option.leaf.upper()


def _help_text(option: Option) -> str:
    facts = [f"type: {type_name(option.annotation)}"]
    facts += [str(option.range)] if option.range else []
    facts += [] if option.default is REQUIRED else [f"default: {_shown(option.default)}"]
    return f"{option.text} ({', '.join(facts)})".replace("%", "%%")


def _shown(value: Any) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list) and value:
        return " ".join(map(_shown, value))
    return str(value) or '""'


def _has_origin(annotation: Any, origin: type) -> bool:
    return any(get_origin(part) is origin for part in (annotation, *get_args(annotation)))
