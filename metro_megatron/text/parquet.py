"""Parquet files, with pyarrow, which is needed for nothing else."""

from collections.abc import Iterator, Sequence
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.text.inputs import Chunk

_ROWS = 256


def row_group_bytes(path: str) -> list[int]:
    """Uncompressed bytes of every row group."""
    metadata = _open(path).metadata
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def read_rows(chunk: Chunk, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """(row number, values of the columns) of the chunk's row groups.

    Raises UserError if a column is missing or the file is damaged.
    """
    path = chunk.file.path
    file = _open(path)
    names = file.schema_arrow.names
    missing = [column for column in columns if column not in names]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}, only {', '.join(names)}; give --text_key")
    place = sum(file.metadata.row_group(group).num_rows for group in range(chunk.begin))
    try:
        batches = file.iter_batches(_ROWS, row_groups=range(chunk.begin, chunk.end), columns=list(columns))
        for batch in batches:
            rows = zip(*(batch.column(column).to_pylist() for column in columns), strict=True)
            for values in rows:
                yield place, list(values)
                place += 1
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}); fetch or write the file again") from error


def _open(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'metro_megatron[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from error
