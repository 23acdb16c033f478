"""Parquet files, with pyarrow, which is needed for nothing else."""

from collections.abc import Iterator, Sequence
from typing import Any

from metro_megatron.errors import UserError

_ROWS, _BYTES = 256, 16 << 20
"""Read, and turned into Python's strings, at once: whichever is less, one row at least."""


def row_group_bytes(path: str) -> list[int]:
    """Uncompressed bytes of every row group."""
    metadata = _open(path).metadata
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def row_groups_place(path: str, row_groups: range) -> tuple[int, int]:
    """Where consecutive row groups begin and end in the file, in bytes."""
    groups = map(_open(path).metadata.row_group, row_groups)
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    begins = [
        min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0) for column in columns
    ]
    ends = (begin + column.total_compressed_size for begin, column in zip(begins, columns, strict=True))
    return min(begins), max(ends)


def column_names(path: str) -> list[str]:
    """Names of the columns, in order."""
    import pyarrow

    try:
        return list(_open(path).schema_arrow.names)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_line(error)})") from error


def read_rows(path: str, row_groups: range, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """(row number, values of the columns) of consecutive row groups; bytes for a string that is not UTF-8.

    Raises UserError if a column is missing or the file is damaged.
    """
    import pyarrow

    file = _open(path)
    names = column_names(path)
    missing = [column for column in columns if column not in names]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}, only {', '.join(names)}; give --text_key")
    twice = [column for column in columns if names.count(column) > 1]
    if twice:
        raise UserError(f"{path}: has column {', '.join(twice)} more than once; rename all but one")
    row = sum(file.metadata.row_group(group).num_rows for group in range(row_groups.start))
    try:
        batches = _batches(file, row_groups, columns)
        for batch in batches:
            for values in zip(*(_values(batch.column(column)) for column in columns), strict=True):
                yield row, list(values)
                row += 1
    except (MemoryError, OSError, pyarrow.ArrowException) as error:
        if isinstance(error, MemoryError):
            raise UserError(
                f"{path}: needs more memory than there is; raise the limit, or use fewer workers"
            ) from error
        raise UserError(f"{path}: damaged ({_line(error)}); fetch or write the file again") from error


def _values(column: Any) -> list[Any]:
    """A column's values; bytes where a string is not UTF-8, which Parquet's writers do not all check."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return list(map(_value, column))


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        of_dictionary = getattr(scalar, "value", scalar)
        return of_dictionary.as_buffer().to_pybytes() if hasattr(of_dictionary, "as_buffer") else None


def _batches(file: Any, row_groups: range, columns: Sequence[str]) -> Iterator[Any]:
    """Consecutive rows of about _BYTES, at most _ROWS of them and at least one."""
    for number in row_groups:
        group = file.metadata.row_group(number)
        rows = max(1, min(_ROWS, group.num_rows * _BYTES // max(1, group.total_byte_size)))
        for batch in file.iter_batches(rows, row_groups=[number], columns=list(columns)):
            # Few strings of a column may stand for many long rows: what rows really weigh is known only now.
            step = max(1, batch.num_rows * _BYTES // max(batch.nbytes, _BYTES))
            yield from (batch.slice(begin, step) for begin in range(0, batch.num_rows, step))


def _open(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'metro_megatron[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (OSError, UnicodeDecodeError, MemoryError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_line(error)})") from error


def _line(error: BaseException) -> str:
    """What an error says, in one line: pyarrow's may have several."""
    return " ".join(str(error).split()) or type(error).__name__
