"""The page of a machine: what it says of stand-ins for a driver, packages and file systems, and the exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from packaging.requirements import Requirement

from metro_megatron import nvidia
from metro_megatron.commands.doctor import Options, main, page_lines
from metro_megatron.machine import software
from metro_megatron.machine.driver import driver
from metro_megatron.machine.finding import Finding
from metro_megatron.machine.gpus import gpus
from metro_megatron.machine.software import misfit, packages
from metro_megatron.machine.system import file_system, system

HEALTHY = "0, NVIDIA A100-SXM4-80GB, 570.86, 1410, 1410, 0x0000000000000001, 0, 41"


def with_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, code: int = 0) -> None:
    """Put an nvidia-smi before all others that says these lines."""
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def denied(path: Path) -> bool:
    raise PermissionError(13, "Permission denied", str(path))


def said(findings: list[Finding]) -> dict[str, str]:
    return {one.subject: f"{one.state}: {one.found} / {one.cost} / {one.remedy}" for one in findings}


def test_a_machine_without_gpus_can_train_on_the_cpu_and_not_on_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(Options(output=str(tmp_path / "runs" / "x"))) == 0
    page = capsys.readouterr().out
    assert "works   torch: " in page and f"works   storage of {tmp_path}" in page
    assert "this machine can train; next:\n  torchrun" in page
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    assert main(Options(gpus=8)) == 1
    page = capsys.readouterr().out
    assert "! wrong   driver: nvidia-smi does not run" in page and "--gpus all" in page
    assert "this machine cannot train as asked: " in page.splitlines()[-1]


def test_what_the_driver_says_of_hot_and_broken_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = "1, NVIDIA A100-SXM4-80GB, 570.86, 705, 1410, 0x0000000000000048, 0, 93"
    broken = "2, NVIDIA A100-SXM4-80GB, 570.86, 1410, 1410, 0x0000000000000004, 3, 40"
    with_driver(tmp_path, monkeypatch, HEALTHY, hot, broken)
    findings = list(driver())
    by_gpu = [(one.subject, one.state, one.is_fatal) for one in findings if one.subject.startswith("GPU ")]
    assert by_gpu == [
        ("GPU 0", "works", False),
        ("GPU 1", "works", False),
        ("GPU 1", "wrong", False),
        ("GPU 2", "works", False),
        ("GPU 2", "wrong", True),
    ]
    assert "hardware slowdown, too hot (hardware)" in findings[2].found and "705 of 1410 MHz" in findings[1].found
    assert "3 memory errors" in findings[4].found and "--gpu-reset --id=2" in findings[4].remedy


def test_a_driver_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(tmp_path, monkeypatch, code=9)
    (finding,) = driver()
    assert finding.is_fatal and finding.subject == "driver" and "exit code 9" in finding.found


@pytest.mark.parametrize("line", ["No devices were found", "Unable to determine the device handle for GPU 0", None])
def test_a_driver_that_answers_with_something_else_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str | None
) -> None:
    with_driver(tmp_path, monkeypatch, *([line] if line else []))
    assert main(Options(gpus=1)) == 1
    page = capsys.readouterr().out
    assert f"! wrong   driver: nvidia-smi ends with exit code 0 and says: {line or 'nothing'}" in page


def test_a_driver_before_535_has_another_name_for_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(tmp_path, monkeypatch)
    answer = f"case \"$*\" in *clocks_event*) echo 'not a valid field to query'; exit 2;; *) echo '{HEALTHY}';; esac"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    assert [(one.subject, one.state) for one in driver()] == [("GPU 0", "works")]


def test_releases_are_compared_with_the_ranges() -> None:
    assert misfit(Requirement("numpy>=2,<3")) == ""
    assert "numpy is" in misfit(Requirement("numpy<1")) and "<1 is needed" in misfit(Requirement("numpy<1"))
    assert misfit(Requirement("no-such-package>=4")) == "no-such-package is not installed, >=4 is needed"


@pytest.mark.parametrize("wants_gpu", [True, False])
def test_another_project_named_apex_is_told_from_nvidias_without_its_kernels(
    wants_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for inside, what in (
        ("", "the package apex is not NVIDIA's"),
        ("optimizers", "Apex is installed without its CUDA"),
    ):
        (tmp_path / "apex" / inside).mkdir(exist_ok=True)
        nvidia.apex_fault.cache_clear()
        apex = said(list(packages(wants_gpu)))["Apex"]
        assert apex.startswith(f"wrong: {what}") and "pip uninstall apex" in apex
    nvidia.apex_fault.cache_clear()


@pytest.mark.parametrize("wants_gpu", [True, False])
@pytest.mark.parametrize("inside", ["", "pytorch"])
def test_half_a_transformer_engine_is_wrong_and_not_absent(
    inside: str, wants_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without metadata, too: built in place, or what a broken uninstallation has left."""
    (tmp_path / "transformer_engine" / inside).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    nvidia.transformer_engine_fault.cache_clear()
    page = said(list(packages(wants_gpu)))["Transformer Engine"]
    nvidia.transformer_engine_fault.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    assert page.startswith("wrong: ") and "2.11.0" in page


def test_a_checkout_that_is_not_installed_and_a_torch_that_does_not_load(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def requires(package: str) -> list[str]:
        raise software.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(software.metadata, "requires", requires)
    monkeypatch.setattr(software, "torch_fault", lambda: "libnccl.so.2: cannot open shared object file")
    assert main(Options()) == 1
    page = capsys.readouterr().out
    assert "! wrong   torch: libnccl.so.2" in page and "metro_megatron itself is not installed" in page
    assert page.splitlines()[-1] == "this machine cannot train as asked: torch, packages"


def test_a_triton_too_old_for_the_kernels_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused.dispatch.WITHOUT", "kernels need Triton 3.6")
    (triton,) = [one for one in packages(True) if one.subject == "Triton"]
    assert triton.state == "absent" and triton.cost and triton.remedy == "pip install 'triton>=3.6'"


def test_storage_that_cannot_be_written_is_fatal_and_one_of_this_machine_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metro_megatron.machine.system.TRIED", 1 << 10)
    closed = "/proc/self"  # not even root writes there
    fatal = [one for one in system(0, closed) if one.is_fatal]
    assert len(fatal) == 1 and fatal[0].cost == "nothing can be saved"
    assert any(one.subject.endswith(", shared") for one in system(0, str(tmp_path)))
    looked = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: looked(path) if path.name != "x" else denied(path))
    assert [one.cost for one in system(0, str(tmp_path / "x")) if one.is_fatal] == ["nothing can be saved"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert [one.cost for one in system(0, str(tmp_path / "link")) if one.is_fatal] == ["nothing can be saved"]
    mounts = [("/", "ext4"), (str(tmp_path), "nfs4"), (str(tmp_path / "run" / "deep"), "tmpfs")]
    partitions = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: partitions)
    assert file_system(tmp_path / "run") == "nfs4" and file_system(Path("/")) == "ext4"
    partitions.insert(1, SimpleNamespace(mountpoint=str(tmp_path), fstype="autofs"))
    assert file_system(tmp_path / "run") == "nfs4", "what the automounter has mounted there"
    assert not any(one.subject.endswith(", shared") for one in system(0, str(tmp_path)))


def test_a_page_line_names_cost_and_remedy_of_what_does_not_work() -> None:
    works = Finding("a", "works", "1", "cost", "remedy")
    assert page_lines(works) == "  works   a: 1"
    lines = page_lines(Finding("a", "absent", "none", "slow", "install", is_needed=True)).splitlines()
    assert [line.strip() for line in lines] == ["! absent  a: none", "cost: slow", "mend: install"]


@pytest.mark.gpu
def test_every_gpu_works() -> None:
    findings = list(gpus(1))
    assert {one.subject for one in findings} >= {"GPU 0", "GPU 0 at work"}
    assert [one for one in findings if one.is_fatal] == []
