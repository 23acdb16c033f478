"""Records: frozen dataclasses as JSON, keys in the order of the fields, types checked where they are read.

A field is a str, int or bool, a record, a class with `to_json` and `from_json` of its own, a dict[str, ...] or tuple of
those, or one of all these or None, which is not written. A file of a record is sealed: its last key is the SHA-256 of
the text without it. Here instead of pydantic: that would be one more dependency, ask for its settings (strict, no other
keys) at every class, and for its messages to be rewritten, which is most of what stands below.
"""

import hashlib
import json
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

SEAL = "record_sha256"
"""Key of a sealed record's hash."""

_Record = TypeVar("_Record")


class DamagedRecord(ValueError):
    """What is wrong with a record: keys that are missing, unknown or of another type."""

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("; ".join(problems))


def to_json(record: object) -> bytes:
    """A record as text."""
    return json.dumps(plain(record), indent=1, ensure_ascii=False).encode() + b"\n"


def sealed(record: object) -> bytes:
    """A record as the content of a file: its text, with the SHA-256 of that text as last key."""
    return to_json(plain(record) | {SEAL: hashlib.sha256(to_json(record)).hexdigest()})


def unsealed(content: bytes) -> Any:
    """What `sealed` made `content` of, as dicts, lists, strings and numbers; files of earlier versions have no seal.

    Raises DamagedRecord for what is no JSON or not what was sealed.
    """
    try:
        value = json.loads(content)
        is_sealed = isinstance(value, dict) and SEAL in value
        if is_sealed:
            del value[SEAL]
        is_whole = not is_sealed or _is_sealed(content) or sealed(value) == content
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(str(error)) from error
    if not is_whole:
        raise DamagedRecord(f"it does not have the SHA-256 that it names as {SEAL}")
    return value


def _is_sealed(content: bytes) -> bool:
    """Whether `content` is what `sealed` makes of a record, told without making it, which takes longer than reading."""
    text, _, seal = content.rpartition(f',\n "{SEAL}": "'.encode())
    return seal == hashlib.sha256(text + b"\n}\n").hexdigest().encode() + b'"\n}\n'


def plain(value: Any) -> Any:
    """A record as dicts, lists, strings and numbers, without what has its default."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        own = ((field, getattr(value, field.name)) for field in fields(value))
        return {field.name: plain(one) for field, one in own if field.default is MISSING or one != field.default}
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return list(map(plain, value)) if isinstance(value, list | tuple) else value


def from_plain(kind: type[_Record], value: object) -> _Record:
    """The record that `plain` made `value` of. A key may be missing where the field has a default.

    Raises DamagedRecord, which names every key that is wrong.
    """
    if not isinstance(value, dict):
        raise DamagedRecord("no object")
    known = _fields(kind)  # type: ignore[arg-type]  # a class is hashable
    problems: list[str] = []
    unusable: list[str] = []
    found: dict[str, Any] = {}
    for name, (hint, is_needed) in known.items():
        if name not in value:
            unusable += [name] if is_needed else []
            continue
        try:
            found[name] = _converted(hint, value[name], name)
        except DamagedRecord as error:
            problems += error.problems
            unusable += [] if error.problems else [name]
    unknown = [_shown(key) for key in value if key not in known]
    problems += [f"unknown {', '.join(unknown)}"] if unknown else []
    problems += [f"no usable {', '.join(unusable)}"] if unusable else []
    if problems:
        raise DamagedRecord(*problems)
    return kind(**found)


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Types of a dataclass's fields by name, and whether they have no default; looked up once, as a run may have a
    million entries."""
    hints = get_type_hints(kind)
    return {field.name: (hints[field.name], field.default is MISSING) for field in fields(kind)}


def _converted(kind: Any, value: Any, name: str) -> Any:
    """The value of a field. Raises DamagedRecord, with problems only where something inside it is to be named."""
    if isinstance(kind, UnionType):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    if type(value) is kind:  # not isinstance: true and false are no numbers
        return value
    if is_dataclass(kind) and isinstance(kind, type) and not hasattr(kind, "from_json"):
        return _inside(kind, value, name)
    if hasattr(kind, "from_json"):
        try:
            return kind.from_json(value)
        except (TypeError, ValueError, AttributeError) as error:
            raise DamagedRecord from error
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: _converted(get_args(kind)[1], one, f"{name} {_shown(key)}") for key, one in value.items()}
    if get_origin(kind) is tuple and isinstance(value, list):
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) == len(value):
            names = (f"{name.removesuffix('s')} {number}" for number in range(len(value)))
            return tuple(map(_converted, kinds, value, names))
    raise DamagedRecord


def _shown(key: str) -> str:
    """A key of whatever was read, in one line."""
    return key if key.isprintable() else ascii(key)


def _inside(kind: type[_Record], value: Any, name: str) -> _Record:
    try:
        return from_plain(kind, value)
    except DamagedRecord as error:
        raise DamagedRecord(f"{name} is damaged: {error}") from error
