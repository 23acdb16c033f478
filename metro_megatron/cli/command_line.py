"""The entry of every tool: a function of a dataclass becomes a command line, mistakes become messages."""

import errno
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from inspect import cleandoc
from pathlib import Path
from typing import NoReturn, get_type_hints

from metro_megatron.cli.options import (
    HELP,
    REQUIRED,
    Option,
    options_of,
    out_of_range,
    print_help,
    read_options,
    with_values,
)
from metro_megatron.errors import UserError

HELD_OUT = 100
"""Documents that pretraining_lines holds out, of at least ten times as many; of fewer than as many, none."""
BASES_SHARE = 0.0005
"""data.validation_fraction of examples/base.yaml."""
EXIT_INTERRUPTED = 128 + signal.SIGINT

_FILE_MISTAKES = {
    errno.ENOENT: "no such file or folder; check the path",
    errno.EACCES: "permission denied; choose a path you may use, or change its permissions",
    errno.EPERM: "not permitted; choose a path you may use",
    errno.EROFS: "on a read-only file system; choose a path that can be written",
    errno.EISDIR: "is a folder, a file is needed",
    errno.ENXIO: "is a pipe, a socket or a device, a file is needed",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "exists already; choose another path or remove it",
    errno.ENOTEMPTY: "the folder is not empty; choose another path or empty it",
    errno.ENOSPC: "no space left on the device; free some or write elsewhere, and run the same command again",
    errno.EIO: "the storage failed; look at its messages (dmesg), and run the same command again when it works",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
}


def run_tool(main: Callable[..., object], report: bool = True, **others: Callable[..., object]) -> NoReturn:
    """Run `main`, or the one of `others` that the first word names, with the options of `sys.argv`, then exit.

    `main` takes a frozen dataclass, whose fields are the options (`--name`); see metro_megatron/cli/options.py. Its
    docstring is the tool's help. A `main` of two parameters gets the tokens of all other options in the second.
    Exit codes: 0, what `main` returns if an int, 2 after a UserError, a file that cannot be used or a package that is
    not installed, 130 after Ctrl-C. `report` is exit_code's.
    """
    argv = sys.argv[1:]
    if argv and argv[0] in others:
        main = others[argv.pop(0)]
    sys.exit(exit_code(lambda: call_with_options(main, argv), report))


def run_printing_tool(main: Callable[..., object]) -> NoReturn:
    """`run_tool` of a tool that does no more than print: into head or less, too, which may end before it."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    run_tool(main)


def is_first_process() -> bool:
    """Whether this is the process that speaks for all that torchrun started."""
    return int(os.environ.get("RANK", 0)) == 0


def is_first_on_machine() -> bool:
    """Whether this is the process that reads for all that torchrun started on this machine what one may read."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def tool_command(name: str) -> str:
    """How to start another tool: by its console script if this one was, else from the checkout."""
    return _console_script(name) if _is_console_script() else f"python tools/{name}.py"


def pretraining_command() -> str:
    """How to pretrain with the preset of the paper's base size, likewise."""
    if _is_console_script():
        return f"torchrun --nproc-per-node 1 --no-python {_console_script('pretrain')} --config base"
    return "torchrun --nproc-per-node 1 pretrain_metro.py --config examples/base.yaml"


def pretraining_lines(prefixes: Sequence[str], documents: int) -> list[str]:
    """What to run with some datasets, of so many documents in all: a small model on any machine, and base on GPUs."""
    script, examples = "pretrain_metro.py", "examples/{}.yaml"
    if _is_console_script():
        script, examples = f"--no-python {_console_script('pretrain')}", "{}"
    train = f"--data.train {' '.join(map(shlex.quote, prefixes))}"
    output = f"--train.output runs/{shlex.quote(Path(prefixes[0]).name if len(prefixes) == 1 else 'mixture')}"
    share = HELD_OUT / max(documents, 1)
    # Documents are held out by a hash of what they say: of a few possibly none, or all.
    fraction = f" --data.validation_fraction {min(share, 0.1) if documents >= HELD_OUT else 0:.1g}"
    small = f"--config {examples.format('demo')} {train}{fraction} {output}"
    large = f"--config {examples.format('base')} {train}{fraction if share > BASES_SHARE else ''} {output}"
    processes = min(2, os.cpu_count() or 1)
    return [
        "next, a small model, on any machine:",
        f"  torchrun --nproc-per-node {processes} {script} {small}",
        "or base, on 8 GPUs:",
        f"  torchrun --nproc-per-node 8 {script} {large}",
    ]


def _console_script(name: str) -> str:
    return f"metro-{name.replace('_', '-')}"


def _is_console_script() -> bool:
    return Path(sys.argv[0]).name.startswith("metro-")


def exit_code(action: Callable[[], object], report: bool = True) -> int:
    """Run `action`; print the user's mistakes (unless not `report`) and return the process's exit code.

    Of several ranks that find the same mistake, only one should report.
    """
    _make_streams_safe()
    try:
        result = action()
    except UserError as error:
        problems = error.problems
    except OSError as error:
        if not is_file_mistake(error):
            raise
        problems = [describe_os_error(error)]
    except ModuleNotFoundError as error:
        problems = _describe_missing(error)
        if not problems:
            raise
    except KeyboardInterrupt:
        if report:
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    else:
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    if report:
        print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr, flush=True)
    return UserError.EXIT_CODE


def _make_streams_safe() -> None:
    """What is said ends nothing, and goes into no file: of a standard stream that the shell has closed (`>&-`) the next
    file opened would have the number. Characters that a console lacks are spelled."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def is_file_mistake(error: OSError) -> bool:
    """Whether it is about a file that a user can do something about."""
    return error.errno in _FILE_MISTAKES


def describe_os_error(error: OSError) -> str:
    """One line for a file that cannot be read or written: path, what is wrong, remedy."""
    path = error.filename2 or error.filename
    if isinstance(path, bytes):
        path = path.decode(errors="replace")
    what = _FILE_MISTAKES.get(error.errno or 0, error.strerror or str(error))
    return f"{path}: {what}" if path is not None else what


def _describe_missing(error: ModuleNotFoundError) -> list[str]:
    """A line for a package that this one, or one of its extras, requires; none for any other."""
    module = (error.name or "").partition(".")[0]
    if module == "metro_megatron":
        return []
    package = {"sklearn": "scikit-learn"}.get(module, module.replace("_", "-"))
    try:
        requirements = metadata.requires("metro_megatron") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return []
    for requirement in requirements:
        if re.match(r"[\w-]+", requirement)[0].replace("_", "-") == package:  # type: ignore[index]
            extra = re.search(r"extra == \W(\w+)", requirement)
            whole = f"metro_megatron[{extra[1]}]" if extra else "metro_megatron"
            return [f'{package} is needed, but not installed: pip install "{whole}"']
    return []


def call_with_options(main: Callable[..., object], argv: Sequence[str]) -> object:
    """Call `main` with the options in `argv`; raises UserError with every problem found.

    `--help` prints the options with their defaults and exits 0.
    """
    hints = get_type_hints(main)
    hints.pop("return", None)
    options_class, *others = hints.values()
    known = {option.leaf: option for option in options_of(options_class)}
    if any(token in HELP for token in argv):
        print_help(cleandoc(main.__doc__ or ""), {"": known})
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
