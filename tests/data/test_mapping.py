"""Mapped files: held by their arrays and views, and by nothing else."""

import os
from pathlib import Path

import numpy as np

from metro_megatron.data.mapping import mapped


def test_a_file_is_mapped_without_a_descriptor_until_its_last_view_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(np.arange(10_000, dtype="<i4").tobytes() + b"end")
    descriptors = len(os.listdir("/proc/self/fd"))
    array = mapped(path, np.dtype("<i4"))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    view = array[9_000:]
    del array
    assert view.tolist() == list(range(9_000, 10_000)) and _is_mapped(path)
    del view
    assert not _is_mapped(path)


def _is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()
