"""What apt says, by a program of its name."""

from pathlib import Path

import pytest

from metro_megatron.errors import UserError
from metro_megatron.text.debian import dependencies, package_versions


def test_what_packages_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "apt-cache"
    program.write_text('#!/bin/sh\nfor one in "$2" "$3"; do echo "$one\n  Depends: $one-15\n  Suggests: other"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert dependencies(["linux-doc", "python3-doc"]) == ["linux-doc-15", "python3-doc-15"]
    program.write_text("#!/bin/sh\nexit 100\n")
    with pytest.raises(UserError, match="cannot ask apt-cache about linux-doc"):
        dependencies(["linux-doc"])


def test_versions_are_in_the_names_of_files(tmp_path: Path) -> None:
    (tmp_path / "git-doc_1%3a2.39.5-0+deb12u3_all.deb").touch()
    (tmp_path / "other.deb").touch()
    assert package_versions(tmp_path) == {"git-doc": "1:2.39.5-0+deb12u3"}
