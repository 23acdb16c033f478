"""Files mapped into memory, to be read, as many as a corpus has: none of them keeps a descriptor.

np.memmap's mmap keeps one for every file (until Python 3.13's trackfd), and a process may have as few as 1,024.
"""

import ctypes
import mmap
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.files import opened_size


def mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """All of a file as numbers of a dtype [n]; bytes behind the last whole one are left out.

    Raises OSError as files.opened.
    """
    descriptor, num_bytes = opened_size(path)
    try:
        size = num_bytes // dtype.itemsize * dtype.itemsize
        if size == 0:
            return np.empty(0, dtype)
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return np.asarray(_Mapping(address, size)).view(dtype)


class _Mapping:
    """Bytes in memory for as long as an array, or a view of one, is made of them; few objects, as there may be 30,000
    files."""

    __slots__ = "_address", "_size"

    def __init__(self, address: int, size: int):
        self._address, self._size = address, size

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": (self._size,), "typestr": "|u1", "data": (self._address, True)}

    def __del__(self) -> None:
        # Not when the interpreter ends: threads may read until the very end.
        if not sys.is_finalizing():
            _libc().munmap(self._address, self._size)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
