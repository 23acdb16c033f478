"""Say what a checkpoint holds, whether it is whole, and in what it differs from another."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from metro_megatron.cli.command_line import run_printing_tool, tool_command
from metro_megatron.cli.options import at_least
from metro_megatron.cli.progress import ReadingProgress

if TYPE_CHECKING:
    from metro_megatron.checkpoint.contents import Contents, Stored


@dataclass(frozen=True)
class Options:
    """Which, and how much of it."""

    load: str
    """Checkpoint (iter_...), run folder, of which the newest is taken, or folder of an exported model."""
    against: str = ""
    """Another one: only what differs is shown."""
    verify: bool = False
    """Compare the hashes of all files with integrity.json, which reads them; else only their lengths."""
    depth: Annotated[int, at_least(0)] = 0
    """Levels of names shown of the tree of tensors; 0: all."""


def main(options: Options) -> int:
    """Say what a checkpoint holds: step, files, configuration, and a tree of tensors with shapes, formats and sizes.

    With --against, in what it differs from another: options, names, shapes, and of each tensor how many numbers differ
    and by how much at most. Nothing is loaded but the tensors that are compared, two at a time, and nothing in a file
    is run. Exit code: 0; 1 where a file is damaged, or two checkpoints differ.
    """
    # Late, so that --help and mistakes do not wait for torch.
    from metro_megatron.checkpoint.contents import Contents

    one = Contents.open(Path(options.load))
    is_whole = _say_integrity(one, options.verify)
    if options.against:
        other = Contents.open(Path(options.against))
        is_whole = _say_integrity(other, options.verify) and is_whole
        return int(not (is_whole and _say_differences(one, other)))
    _say_configuration(one)
    print(*tree(one.tensors, options.depth), sep="\n")
    print(
        f"next: {tool_command('checkpoint_info')} --load {options.load} --against ANOTHER"
        + ("" if options.verify or not one.has_integrity else ", or --verify for the hashes of its files")
    )
    return int(not is_whole)


def _say_integrity(one: Contents, verify: bool) -> bool:
    """What it is, and whether all of it is there."""
    progress, sizes = one.progress, [path.stat().st_size for path in one.files]
    after = (
        f"after step {progress['step']:,}, {progress['consumed_samples']:,} samples, {progress['seen_tokens']:,} tokens"
        if progress.keys() >= {"step", "consumed_samples", "seen_tokens"}
        else "without a place in a run"
    )
    numbers = sum(stored.numel for stored in one.tensors.values())
    print(
        f"{one.folder}: {after}\n"
        f"  {len(sizes)} files, {_size(sum(sizes))}; {len(one.tensors)} tensors, {numbers:,} numbers, "
        f"{_size(one.num_bytes)}"
    )
    if not one.has_integrity:
        print("  no integrity.json, so that nothing says what its files should be")
        return True
    with ReadingProgress(f"{one.folder}: hashes", sum(sizes)) as reading:
        damage = one.damage(verify, reading.advance)
    compared = "hashes" if verify else "lengths"
    print(f"  {compared} of its files are as they were written" if not damage else "  DAMAGED:", flush=True)
    for line in damage:
        print(f"    {line}")
    return not damage


def _say_configuration(one: Contents) -> None:
    told = {name: value for name, value in one.options.items() if value != one.defaults.get(name, _NOTHING)}
    print("configuration" + (", where it is not the default" if one.defaults else ""))
    for name, value in told.items():
        print(f"  {name}: {value}")


_NOTHING = object()


def _say_differences(one: Contents, other: Contents) -> bool:
    """Whether there are none."""
    from metro_megatron.checkpoint.contents import comparable, differences, misfits, option_differences

    changed = list(option_differences(one, other))
    lines = list(misfits(one, other))
    print(f"{len(changed)} options differ, {len(lines)} tensors have no counterpart")
    for name, here, there in changed:
        print(f"  {name}: {_shown(here)} | {_shown(there)}")
    print(*(f"  {line}" for line in lines), sep="\n", end="\n" if lines else "")
    names = comparable(one, other)
    total = sum(contents.tensors[name].num_bytes for contents in (one, other) for name in names)
    count = 0
    with ReadingProgress("comparing", total) as reading:
        for found in differences(one, other, reading.advance):
            count += 1
            formats = " / ".join(dict.fromkeys(map(_format, found.dtypes)))
            print(f"  {found.name} ({formats}): {found.share:.2%} differ, by {found.largest:.4g} at most", flush=True)
    print(f"{len(names) - count} of {len(names)} tensors are equal bit for bit")
    return not (changed or lines or count)


def tree(tensors: Mapping[str, Stored], depth: int = 0) -> Iterator[str]:
    """Lines of names, level by level, with numbers and bytes of all below; single children stand with their parent."""
    yield from _branch([(name.split("."), stored) for name, stored in tensors.items()], "", depth or sys.maxsize)


def _branch(found: Sequence[tuple[Sequence[str], Stored]], indent: str, depth: int) -> Iterator[str]:
    children: dict[str, list[tuple[Sequence[str], Stored]]] = {}
    for (head, *rest), stored in found:
        children.setdefault(head, []).append((rest, stored))
    for head, below in children.items():
        while len(below) > 1 and len({rest[0] for rest, _ in below if rest}) == 1 and all(rest for rest, _ in below):
            head, below = f"{head}.{below[0][0][0]}", [(rest[1:], stored) for rest, stored in below]
        if len(below) == 1:
            ((tail, stored),) = below
            shape = " x ".join(map(str, stored.shape)) or "one number"
            name = ".".join([head, *tail])
            yield f"{indent}{name}  [{shape}] {_format(stored.dtype)}, {_size(stored.num_bytes)}"
            continue
        numbers, size = (sum(getattr(stored, what) for _, stored in below) for what in ("numel", "num_bytes"))
        yield f"{indent}{head}  {len(below)} tensors, {numbers:,} numbers, {_size(size)}"
        if depth > 1:
            leaves = [(rest or [""], stored) for rest, stored in below]
            yield from _branch(leaves, indent + "  ", depth - 1)


def _shown(value: object) -> str:
    return "none" if value is None else repr(value)


def _format(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


run = partial(run_printing_tool, main)
"""The console script."""
