"""Whether inputs still have the bytes that were read: times only save work, hashes decide."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metro_megatron.cli.progress import ReadingProgress
from metro_megatron.text.documents import stored_bytes
from metro_megatron.text.inputs import PARQUET, InputFile


@dataclass(frozen=True)
class Piece:
    """Bytes begin to end of a file, as they were when they were read."""

    file: InputFile
    begin: int
    end: int
    sha256: str
    """As `ChunkReader.sha256`; empty where an earlier version did not hash it, as Parquet's row groups behind the
    first."""


def rewritten(pieces: Sequence[Piece]) -> list[str]:
    """A line for each file of which a piece has other bytes now. Raises UserError for one that cannot be read."""
    known = [piece for piece in pieces if piece.sha256]
    lines: dict[str, str] = {}
    with ReadingProgress("comparing inputs with what was read", sum(map(_size, known))) as progress:
        for piece in known:
            if stored_bytes(piece.file, piece.begin, piece.end).finish() != piece.sha256:
                lines[piece.file.path] = f"{piece.file.path}: has other bytes than when it was read"
            progress.advance(_size(piece))
    return list(lines.values())


def pieces_of(file: InputFile, pieces: Iterable[tuple[int, int, str]]) -> list[Piece]:
    """Pieces of a file as manifests hold them."""
    return [Piece(file, *piece) for piece in pieces]


def _size(piece: Piece) -> int:
    return piece.file.size if piece.file.ending in PARQUET else piece.end - piece.begin
