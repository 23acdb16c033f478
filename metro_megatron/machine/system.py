"""Processors, memory, limits, and the storage that a run is kept on."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from metro_megatron.machine.finding import Finding

OPEN_FILES = 8192
"""Sockets between ranks, and files of workers."""
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "wekafs", "virtiofs", "glusterfs", "smb", "cifs")
"""Beginnings of the types of file systems that several machines may have mounted."""
TRIED = 64 << 20
"""Bytes written to storage to see how fast it is."""
SLOW_STORAGE = 50e6
"""Bytes a second: a checkpoint of base, 3 GB, would take a minute."""
GPU_CORES = 4
"""Of the host for each GPU: one launches kernels, one prepares batches, the rest is NCCL's and the system's."""
DISTANT_TEMPORARY = 80
"""Characters of TMPDIR; names of sockets end at 107."""


def system(gpus: int, output: str) -> Iterator[Finding]:
    """What the operating system gives to a run on so many GPUs whose folder is `output` (empty: not known)."""
    yield from _host(gpus)
    yield from _limits(gpus)
    yield from _environment(gpus)
    if output:
        yield from _storage(Path(output))


def _host(gpus: int) -> Iterator[Finding]:
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total
    found = f"{cores} cores, {memory / 1e9:,.0f} GB of memory"
    if cores < GPU_CORES * gpus:
        remedy = f"give the job {GPU_CORES * gpus} cores (Slurm: --cpus-per-task)"
        yield Finding("host", "wrong", found, "GPUs wait for their kernels to be launched", remedy)
    else:
        yield Finding("host", "works", found)


def _limits(gpus: int) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        cost = "jobs of hundreds of ranks may not find each other"
        yield Finding("open files", "wrong", f"at most {hard:,}", cost, "LimitNOFILE, or limits.conf: nofile 1048576")
    else:
        yield Finding("open files", "works", f"{soft:,}, at most {'no limit' if hard < 0 else f'{hard:,}'}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if gpus and locked != resource.RLIM_INFINITY and Path("/sys/class/infiniband").exists():
        cost = "NCCL cannot use InfiniBand"
        yield Finding("locked memory", "wrong", f"at most {locked >> 20:,} MiB", cost, "limits.conf: memlock unlimited")
    shared = Path("/dev/shm")
    if gpus > 1 and (not shared.is_dir() or shutil.disk_usage(shared).total < gpus * 1e9):
        cost, remedy = "NCCL fails, or goes through the network inside a machine", "in a container --ipc=host"
        yield Finding("/dev/shm", "wrong", "less than 1 GB for each GPU", cost, remedy)


def _environment(gpus: int) -> Iterator[Finding]:
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:
        remedy = "export TMPDIR=, a folder that can be written and is not full"
        yield Finding("TMPDIR", "wrong", str(error), "processes cannot be joined", remedy, is_needed=True)
        temporary = ""
    if len(temporary) > DISTANT_TEMPORARY:
        cost = "sockets of helpers cannot be made below it"
        yield Finding("TMPDIR", "wrong", f"{temporary} is long", cost, "export TMPDIR=/tmp")
    if gpus and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        cost = "with sequence parallelism communication does not hide behind compute"
        found = "CUDA_DEVICE_MAX_CONNECTIONS is not 1"
        yield Finding("environment", "wrong", found, cost, "export CUDA_DEVICE_MAX_CONNECTIONS=1")


def _storage(folder: Path) -> Iterator[Finding]:
    """Write, sync, rename and remove below the folder, as a save does."""
    subject, there = f"storage of {folder}", folder
    try:
        while not (there.exists() or there.is_symlink()):  # nothing can be made where a link leads nowhere
            there = there.parent
        rate = _written_per_second(there)
    except OSError as error:
        remedy = "choose a folder that can be written"
        yield Finding(subject, "wrong", str(error), "nothing can be saved", remedy, is_needed=True)
        return
    kind, free = file_system(there), shutil.disk_usage(there).free
    found = f"{kind}, {free / 1e9:,.0f} GB free, {rate / 1e6:,.0f} MB/s written and synced"
    if rate < SLOW_STORAGE:
        yield Finding(subject, "wrong", found, "saves take long, and training waits for them", "choose a faster one")
    else:
        yield Finding(subject, "works", found)
    if not kind.startswith(SHARED):
        cost = "a run on several machines ends at its start: all must see one folder"
        yield Finding(f"{subject}, shared", "absent", f"{kind} is of this machine alone", cost, "a network file system")


def _written_per_second(folder: Path) -> float:
    data = os.urandom(TRIED)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor.") as name:
        path = Path(name) / "written"
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.rename(path.with_name("renamed"))
    return TRIED / (time.monotonic() - start)


def file_system(folder: Path) -> str:
    """Type of the file system that a folder is on, as the system calls it."""
    place = folder.resolve()
    # Of several mounted on one folder the last is seen: an automounter's, then what it has mounted.
    mounts = [one for one in psutil.disk_partitions(all=True) if place.is_relative_to(one.mountpoint)]
    return max(reversed(mounts), key=lambda one: len(Path(one.mountpoint).parts)).fstype if mounts else "unknown"
