"""The entry of every tool: a function of a dataclass becomes a command line, mistakes become messages."""

import errno
import inspect
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from inspect import cleandoc
from typing import Any, NoReturn, get_type_hints

import docstring_parser

from metro_megatron.cli.options import (
    HELP,
    REQUIRED,
    Option,
    help_parser,
    options_of,
    out_of_range,
    read_options,
    with_values,
)
from metro_megatron.errors import UserError

EXIT_INTERRUPTED = 128 + signal.SIGINT

_FILE_MISTAKES = {
    errno.ENOENT: "no such file or folder; check the path",
    errno.EACCES: "permission denied; choose a path you may use, or change its permissions",
    errno.EPERM: "not permitted; choose a path you may use",
    errno.EROFS: "on a read-only file system; choose a path that can be written",
    errno.EISDIR: "is a folder, a file is needed",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "exists already; choose another path or remove it",
    errno.ENOTEMPTY: "the folder is not empty; choose another path or empty it",
    errno.ENOSPC: "no space left on the device; free some or write elsewhere, and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
}


def run_tool(main: Callable[..., object]) -> NoReturn:
    """Run `main` with the options of `sys.argv`, then exit.

    `main` takes a frozen dataclass, whose fields are the options (`--name`); see metro_megatron/cli/options.py. Its
    docstring is the tool's help. A `main` of two parameters gets the tokens of all other options in the second.
    Exit codes: 0, what `main` returns if an int, 2 after a UserError or a file that cannot be used,
    130 after Ctrl-C.
    """
    sys.exit(exit_code(lambda: call_with_options(main, sys.argv[1:])))


def exit_code(action: Callable[[], object], report: bool = True) -> int:
    """Run `action`; print the user's mistakes (unless not `report`) and return the process's exit code.

    Of several ranks that find the same mistake, only one should report.
    """
    try:
        result = action()
    except UserError as error:
        problems = error.problems
    except OSError as error:
        if error.errno not in _FILE_MISTAKES:
            raise
        problems = [describe_os_error(error)]
    except KeyboardInterrupt:
        if report:
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    else:
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    if report:
        print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr, flush=True)
    return UserError.EXIT_CODE


def describe_os_error(error: OSError) -> str:
    """One line for a file that cannot be read or written: path, what is wrong, remedy."""
    path = error.filename2 or error.filename
    if isinstance(path, bytes):
        path = path.decode(errors="replace")
    what = _FILE_MISTAKES.get(error.errno or 0, error.strerror or str(error))
    return f"{path}: {what}" if path is not None else what


def call_with_options(main: Callable[..., object], argv: Sequence[str]) -> object:
    """Call `main` with the options in `argv`; raises UserError with every problem found.

    `--help` prints the options with their defaults and exits 0.
    """
    hints = get_type_hints(main)
    hints.pop("return", None)
    if not is_dataclass(next(iter(hints.values()))):
        return _call_with_parameters(main, hints, argv)
    options_class, *others = hints.values()
    known = {option.leaf: option for option in options_of(options_class)}
    if any(token in HELP for token in argv):
        help_parser(cleandoc(main.__doc__ or ""), {"options": known}).print_help()
        sys.exit(0)
    given = read_options(argv, known, keep_unknown=bool(others))
    problems = [*given.problems, *out_of_range(known, given.values, prefix="--"), *_missing(known, argv)]
    if problems:
        raise UserError(problems)
    options = with_values(options_class, given.values)
    return main(options, given.unknown) if others else main(options)


def _missing(known: Mapping[str, Option], argv: Sequence[str]) -> list[str]:
    written = {token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")}
    required = [name for name, option in known.items() if option.default is REQUIRED]
    return [f"--{name}: required, but not given; see --help" for name in required if name not in written]


def _call_with_parameters(main: Callable[..., object], hints: dict[str, Any], argv: Sequence[str]) -> object:
    """The older way, until the last tool has its dataclass: parameters are options, the docstring is help."""
    docstring = docstring_parser.parse(main.__doc__ or "")
    texts = {one.arg_name: one.description or "" for one in docstring.params}
    known = {
        name: Option(name, hints[name], REQUIRED if one.default is one.empty else one.default, texts.get(name, ""))
        for name, one in inspect.signature(main).parameters.items()
    }
    if any(token in HELP for token in argv):
        help_parser(docstring.description or "", {"options": known}).print_help()
        sys.exit(0)
    given = read_options(argv, known)
    problems = [*given.problems, *_missing(known, argv)]
    if problems:
        raise UserError(problems)
    return main(**given.values)
