"""Files mapped into memory, to be read, as many as a corpus has: none of them keeps a descriptor.

np.memmap's mmap keeps one for every file (until Python 3.13's trackfd), and a process may have as few as 1,024.
"""

import ctypes
import mmap
import os
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.files import regular


def mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """All of a file as numbers of a dtype [n]; bytes behind the last whole one are left out.

    Raises OSError as files.regular.
    """
    descriptor = os.open(regular(path), os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size // dtype.itemsize * dtype.itemsize
        if size == 0:
            return np.empty(0, dtype)
        content = _Mapping(path, descriptor, size)
    finally:
        os.close(descriptor)
    return np.asarray(content).view(dtype)


class _Mapping:
    """Bytes of a file in memory for as long as an array, or a view of one, is made of them."""

    def __init__(self, path: Path, descriptor: int, size: int):
        libc = _libc()
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, True)}
        # Not when the interpreter ends: threads may read until the very end.
        weakref.finalize(self, libc.munmap, address, size).atexit = False


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
