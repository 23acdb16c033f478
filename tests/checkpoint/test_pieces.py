"""Blocks of tensors: those of a range of elements, and any of them read from blocks that were cut otherwise."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from metro_megatron.checkpoint.files import check_metadata
from metro_megatron.checkpoint.pieces import Piece, blocks, read_pieces
from metro_megatron.checkpoint.writing import write_piece
from metro_megatron.errors import UserError


def cut(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))]


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
    written = [one for start, end in ((0, 7), (7, 30)) for one in blocks(tensor.shape, start, end)]
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        results = [
            write_piece(file, "__0_0.distcp", ("x", offsets), cut(tensor, offsets, sizes)) for offsets, sizes in written
        ]
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in written]
    properties = TensorProperties(torch.float32)
    entry = TensorStorageMetadata(properties, tensor.size(), chunks)
    dcp.FileSystemWriter(tmp_path).finish(Metadata({"x": entry}), [results])
    metadata = check_metadata(tmp_path)
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
    entry.chunks.pop()
    with pytest.raises(UserError, match="has not all of x"):
        read_pieces(tmp_path, Metadata({"x": entry}, storage_data=metadata.storage_data), pieces[:1])
