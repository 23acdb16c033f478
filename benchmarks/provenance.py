"""Where, when and with what something was measured; every benchmark writes it beside its rows."""

import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from fused.dispatch import MISSING

ROOT = Path(__file__).parents[1]


def provenance(device: torch.device, command: Sequence[str], commit: str = "") -> dict[str, str]:
    """Device, driver, versions, commit, date (UTC) and command; commit stands in where the copy has no git."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"cpu ({platform.machine()})",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": _commit() or commit or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
    }


def _triton_version() -> str:
    if MISSING:
        return f"none ({MISSING})"
    import triton

    return triton.__version__


def _commit() -> str:
    """The commit of the checkout, with "-dirty" where tracked files differ from it; empty without git.

    docs/ is not asked, where results are written to.
    """
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    is_dirty = head and _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":!docs")
    return f"{head}-dirty" if is_dirty else head


def _output(*command: str) -> str:
    """First line that a command prints; empty where it cannot be run or fails."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip().partition("\n")[0]
