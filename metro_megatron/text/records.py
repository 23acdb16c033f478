"""A record of a text file before it is a document, and why it is none."""

from dataclasses import dataclass
from enum import StrEnum


class Reject(StrEnum):
    """Why a record gives no document."""

    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_KEY = "missing_key"
    NOT_A_STRING = "not_a_string"
    NOT_UTF8 = "not_utf8"
    NUL = "nul"
    EMPTY = "empty"
    TOO_LONG = "too_long"
    CUT_OFF = "cut_off"
    """The file ends inside a JSON value or array."""


@dataclass(frozen=True)
class Record:
    """One JSON value, the lines between two blank ones, or the text of a Parquet row."""

    position: int
    """Its first byte in the file, decompressed and as UTF-8; row number for Parquet."""
    raw: bytes | str | Reject
    """Text where it was decoded already; a reason where there is nothing to parse."""
    is_json: bool
