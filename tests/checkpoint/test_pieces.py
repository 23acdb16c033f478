"""Blocks of tensors: those of a range of elements, and any of them read from blocks that were cut otherwise."""

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from metro_megatron.checkpoint.files import Damaged, check_metadata, write_integrity
from metro_megatron.checkpoint.pieces import Piece, blocks, read_pieces
from metro_megatron.checkpoint.writing import write_piece
from metro_megatron.errors import UserError

FILE = "__0_0.distcp"


def cut(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))]


def write(folder: Path, tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Metadata:
    """A checkpoint of one tensor in blocks of these ranges of elements."""
    written = [one for start, end in ranges for one in blocks(tensor.shape, start, end)]
    with (folder / FILE).open("wb") as file:
        results = [write_piece(file, FILE, ("x", offsets), cut(tensor, offsets, sizes)) for offsets, sizes in written]
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in written]
    entry = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.size(), chunks)
    dcp.FileSystemWriter(folder).finish(Metadata({"x": entry}), [results])
    write_integrity(folder)
    return check_metadata(folder)


def load_and_forget(load: Callable[..., Tensor], *arguments: object, map_location: str, **options: object) -> Tensor:
    """As earlier releases of torch load a tensor to the device meta."""
    loaded = load(*arguments, map_location=map_location, **options)
    if map_location == "meta":
        loaded.untyped_storage()._checkpoint_offset = None
    return loaded


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (1, 5), (2, 3, 4), (4, 1, 3)])
def test_blocks_of_a_range_are_its_elements_in_order(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for start in range(tensor.numel()):
        for end in range(start, tensor.numel() + 1):
            found = list(blocks(shape, start, end))
            elements = [int(one) for offsets, sizes in found for one in cut(tensor, offsets, sizes).reshape(-1)]
            assert elements == list(range(start, end)) and len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("says_where", [True, False], ids=["torch says where numbers lie", "torch reads all"])
def test_any_block_is_read_from_blocks_of_other_ranges_and_into_another_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says_where: bool
) -> None:
    """[5, 6] of which ranges of 7 and 23 elements were written, read in rows, columns and in the middle."""
    if not says_where:
        monkeypatch.setattr(torch, "load", partial(load_and_forget, torch.load))
    tensor = torch.randn(5, 6)
    metadata = write(tmp_path, tensor, ((0, 7), (7, 30)))
    wanted = [((0, 0), (5, 6)), ((2, 0), (2, 6)), ((0, 3), (5, 3)), ((1, 1), (3, 2)), ((4, 5), (1, 1))]
    for dtype in (torch.float32, torch.bfloat16):
        pieces = [Piece("x", (5, 6), offsets, torch.zeros(sizes, dtype=dtype)) for offsets, sizes in wanted]
        for piece in pieces:
            read_pieces(tmp_path, metadata, [piece])
            assert piece.tensor.equal(cut(tensor, piece.offsets, piece.tensor.shape).to(dtype))
    in_place = torch.zeros(6, 5).t()  # of no plain layout
    read_pieces(tmp_path, metadata, [Piece("x", (5, 6), (0, 0), in_place)])
    assert in_place.equal(tensor)
    with pytest.raises(UserError, match="has nothing of y"):
        read_pieces(tmp_path, metadata, [Piece("y", (1,), (0,), torch.zeros(1))])
    with pytest.raises(UserError, match=r"has \[5, 6\] of x, \[6, 6\] is wanted"):
        read_pieces(tmp_path, metadata, [Piece("x", (6, 6), (0, 0), torch.zeros(6, 6))])
    entry = metadata.state_dict_metadata["x"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.chunks.pop()
    with pytest.raises(UserError, match="has not all of x"):
        read_pieces(tmp_path, Metadata({"x": entry}, storage_data=metadata.storage_data), pieces[:1])


def test_torch_is_asked_once_where_numbers_of_blocks_that_begin_alike_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of equal length begin alike; one in the middle that was written transposed has their length, no more."""
    tensor = torch.randn(5, 6, 4)
    metadata = write(tmp_path, tensor, [(row * 24, row * 24 + 24) for row in range(5)])
    storage = metadata.storage_data
    place = storage[MetadataIndex("x", (2, 0, 0))]
    own = io.BytesIO()
    torch.save(tensor[2:3].transpose(1, 2).contiguous().transpose(1, 2), own)
    contents = bytearray((tmp_path / FILE).read_bytes())
    assert own.getbuffer().nbytes == place.length
    contents[place.offset : place.offset + place.length] = own.getvalue()
    (tmp_path / FILE).write_bytes(contents)
    write_integrity(tmp_path)
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: asked.append(args) or load(*args, **options))
    piece = Piece("x", (5, 6, 4), (0, 0, 0), torch.zeros(5, 6, 4))
    read_pieces(tmp_path, metadata, [piece], [FILE])  # by one thread: several may ask at the same moment
    assert piece.tensor.equal(tensor) and len(asked) == 2


def test_a_file_is_read_once_and_summed_by_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all of it, whatever part is wanted; twice is read what two want, and what says where numbers lie."""
    tensor = torch.randn(400, 500)
    metadata = write(tmp_path, tensor, ((0, 90_250), (90_250, 200_000)))
    sizes, read = [], os.preadv

    def count(*arguments: Any) -> int:
        sizes.append(read(*arguments))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", count)
    wanted = [((0, 0), (400, 500)), ((170, 3), (200, 400)), ((399, 0), (1, 500))]
    for offsets, shape in wanted:
        for dtype in (torch.float32, torch.float64):
            sizes.clear()
            piece = Piece("x", (400, 500), offsets, torch.zeros(shape, dtype=dtype))
            read_pieces(tmp_path, metadata, [piece], [FILE, ".metadata"])
            assert piece.tensor.equal(cut(tensor, offsets, shape).to(dtype))
            written = sum((tmp_path / name).stat().st_size for name in (FILE, ".metadata"))
            assert written <= sum(sizes) <= 1.01 * written
    pieces = [Piece("x", (400, 500), offsets, torch.zeros(shape)) for offsets, shape in wanted]
    read_pieces(tmp_path, metadata, pieces, [FILE])
    assert all(piece.tensor.equal(cut(tensor, piece.offsets, piece.tensor.shape)) for piece in pieces)


def test_a_bit_that_was_flipped_anywhere_is_damage_whatever_reading_makes_of_it(tmp_path: Path) -> None:
    tensor = torch.randn(5, 6)
    metadata = write(tmp_path, tensor, ((0, 7), (7, 30)))
    whole = (tmp_path / FILE).read_bytes()
    wanted = [Piece("x", (5, 6), (1, 1), torch.zeros(3, 2))]
    for place in range(0, len(whole), 41):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(Damaged, match=f"{FILE}: damaged, its contents"):
            read_pieces(tmp_path, metadata, wanted, [FILE])
    (tmp_path / FILE).write_bytes(whole[:-1])
    with pytest.raises(Damaged, match=f"{FILE}: damaged, has {len(whole) - 1} bytes"):
        read_pieces(tmp_path, metadata, wanted, [FILE])
    (tmp_path / FILE).unlink()
    with pytest.raises(Damaged, match=f"{FILE}: missing"):
        read_pieces(tmp_path, metadata, wanted, [FILE])
