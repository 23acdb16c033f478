"""Installations of Transformer Engine and Apex of which a part is missing, each named with what mends it."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metro_megatron import nvidia
from metro_megatron.errors import UserError

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put packages of the given files, all but __init__.py empty, where they are imported from."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package: str, code: str, *modules: str) -> None:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
        for module in modules:
            (tmp_path / package / f"{module}.py").touch()
        information = tmp_path / f"{package}-9.9.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")
        importlib.invalidate_caches()

    def forget() -> None:
        nvidia.transformer_engine_fault.cache_clear()
        nvidia.apex_fault.cache_clear()
        for name in list(sys.modules):
            if name.partition(".")[0] in ("transformer_engine", "apex", "amp_C"):
                del sys.modules[name]

    forget()
    yield install
    forget()


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError('Found empty `transformer-engine` meta package')",
        "FileNotFoundError('Could not find shared object file for Transformer Engine torch lib')",
        "OSError('libcuda.so.1: cannot open shared object file')",
        "AssertionError('Transformer Engine package version mismatch')",
        "ImportError('undefined symbol: _ZN3c10')",
        "AttributeError('module torch has no attribute')",
        "AssertionError('')",
    ],
)
def test_a_part_that_is_missing_is_named_and_hidden_from_megatron_core(install: Install, error: str) -> None:
    """By what an import raises where one of the three packages is not there, or is of another release or torch."""
    install("transformer_engine", f"raise {error}")
    fault = nvidia.transformer_engine_fault()
    assert error.split("'")[1] in fault and error.split("(")[0] in fault
    assert nvidia.TE_COMMAND in fault and "pip uninstall transformer_engine" in fault
    with pytest.raises(ImportError):
        import transformer_engine  # noqa: F401  as megatron-core asks
    assert nvidia.transformer_impl("auto", "cuda", "bf16") == "local"
    assert fault in nvidia.describe("auto", "cuda", "bf16", "none", "torch")
    assert "does not load" not in nvidia.describe("auto", "cpu", "bf16", "none", "torch")


def test_one_that_megatron_core_went_on_without_is_named(install: Install) -> None:
    importlib.import_module("megatron.core.extensions.transformer_engine")  # that there is none is settled now
    install("transformer_engine", "", "pytorch")
    assert nvidia.transformer_engine_fault().startswith("megatron-core cannot use Transformer Engine 9.9")


def test_what_is_asked_for_and_not_there_is_refused_at_once(install: Install) -> None:
    nvidia.refuse_missing("auto", "torch", "none", "cuda")
    with pytest.raises(UserError) as caught:
        nvidia.refuse_missing("transformer_engine", "apex", "tensorwise", "cuda")
    engine, apex = caught.value.problems
    assert engine.startswith("parallel.transformer_impl and train.fp8_recipe need Transformer Engine: ")
    assert "not installed" in engine and nvidia.TE_COMMAND in engine
    assert "Apex is not installed" in apex and nvidia.APEX_COMMAND in apex


def test_the_other_apex_is_recognised(install: Install) -> None:
    install("apex", "")
    assert nvidia.apex_fault().startswith("the package apex is not NVIDIA's: pip uninstall apex")
    install("amp_C", "raise ImportError('undefined symbol')")
    nvidia.apex_fault.cache_clear()
    assert "do not load (undefined symbol)" in nvidia.apex_fault()
