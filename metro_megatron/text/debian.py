"""Debian's packages as a source of text: downloaded and unpacked by whoever asks, without rights."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from metro_megatron.errors import UserError


def fetch_packages(folder: Path, packages: Sequence[str]) -> None:
    """Download packages with apt-get and unpack them below `folder`; needs Debian, but no rights."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", *packages], cwd=folder, check=True, capture_output=True)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"cannot fetch Debian packages ({error}); give a folder of text with --text") from error


def dependencies(packages: Sequence[str]) -> list[str]:
    """What packages depend on, such as the one of Debian's version; needs Debian."""
    try:
        found = subprocess.run(["apt-cache", "depends", *packages], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"cannot ask apt-cache about {', '.join(packages)} ({error})") from error
    return [line.split()[1] for line in found.splitlines() if line.startswith("  Depends: ")]


def package_versions(folder: Path) -> dict[str, str]:
    """Versions of the packages that were downloaded to `folder`, by name."""
    parts = (path.name.split("_") for path in sorted(folder.glob("*_*_*.deb")))
    return {name: version.replace("%3a", ":") for name, version, *_ in parts}
