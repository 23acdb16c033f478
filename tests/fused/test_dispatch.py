import collections
import importlib
import os
import pkgutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import fused
from fused import dispatch
from fused.dispatch import describe, reference_only, use_cpu, use_kernel

CPU = torch.device("cpu")


def test_kernels_need_a_gpu_or_a_test(device):
    x = torch.zeros(1)
    assert use_kernel("layer_norm", x) and use_kernel("layer_norm", x, x.half(), x.bfloat16())
    assert not use_kernel("layer_norm", x, x.double())
    assert ("interpreter, for tests" if device == CPU else "kernels on") in describe(device)


def test_reference_only_nests_and_holds_in_every_thread(device):
    seen = []
    with reference_only():
        with reference_only():
            pass
        x = torch.zeros(1)
        thread = threading.Thread(target=lambda: seen.append(use_kernel("layer_norm", x)))
        thread.start()
        thread.join()
        assert "asks for them" in describe(device)
    assert seen == [False] and use_kernel("layer_norm", torch.zeros(1))


def test_single_operators_take_their_references(device):
    with reference_only("attention", "layer_norm"):
        assert not use_kernel("attention", torch.zeros(1)) and use_kernel("softmax_dropout", torch.zeros(1))
        assert "references" not in describe(device)
    with pytest.raises(ValueError, match="no operator is called flash; there are attention, "), reference_only("flash"):
        pass


def test_the_references_come_back_after_an_error():
    with pytest.raises(KeyError), reference_only():
        raise KeyError
    assert use_kernel("layer_norm", torch.zeros(1))


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "capability, shared_kb, wanted, tiles",
    [
        ((7, 5), 64, "8.0 and this device has 7.5", 80),
        ((8, 0), 163, "on A GPU", 80),
        ((8, 9), 99, "on A GPU", 80),
        ((9, 0), 227, "on A GPU", 90),
        ((10, 0), 227, "on A GPU", 90),
        ((12, 0), 99, "on A GPU", 80),  # newer than H100, with less memory
    ],
)
def test_gpus_are_described(monkeypatch, capability, shared_kb, wanted, tiles):
    gpu = SimpleNamespace(major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared_kb * 1024)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert wanted in describe(GPU)
    assert dispatch.architecture(GPU) == tiles


@pytest.mark.parametrize(
    "version, is_old", [("3.5.1", True), ("2.10.0", True), ("3.6.0", False), ("3.10.0+git1", False), ("main", False)]
)
def test_old_releases_of_triton_are_named(monkeypatch, version, is_old):
    monkeypatch.setattr(dispatch, "WITHOUT", dispatch.without(version, ""))
    message = f"because kernels need Triton 3.6 and this is {version}; `pip install 'triton>=3.6'`"
    assert (message in describe(CPU)) == is_old
    if is_old:
        assert not use_kernel("layer_norm", torch.zeros(1))


def test_what_is_asked_at_each_call_can_be_traced():
    """Nothing of Python's library: Dynamo of torch 2.11 cannot follow a regular expression."""
    called = []
    x = torch.zeros(1)
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        assert use_kernel("layer_norm", x) and use_cpu("layer_norm", x) == (x.device == CPU)
        dispatch.architecture(x.device), dispatch.processors(x.device)
    finally:
        sys.setprofile(None)
    library = os.path.dirname(os.__file__)
    assert dispatch.__file__ in called
    others = {name for name in called if name.startswith(library) and "site-packages" not in name}
    assert others <= {collections.__file__}  # Counter


def test_the_interpreter_does_not_train(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert "unset it" in describe(GPU)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
for name in {names}:
    __import__(name)
from fused.attention import CompactBias, Dropout, attention, packed_samples
from fused.dispatch import describe
from fused.layer_norm import RowDropout, layer_norm
x, seed = torch.randn(7, 1, 3, requires_grad=True), torch.tensor([1])
y = layer_norm(x, torch.ones(3), torch.zeros(3), 1e-5, dropout=RowDropout(0.5, seed, torch.arange(7)))
bias, samples = CompactBias(torch.zeros(1, 3), torch.zeros(1, 2)), packed_samples(torch.tensor([0, 3, 7]), 4)
y = attention(y, y, y, bias, samples, Dropout(0.5, seed, torch.arange(2)))
y.sum().backward()
print(describe(torch.device("cpu")))
"""


def test_references_run_without_triton():
    names = [f"fused.{module.name}" for module in pkgutil.iter_modules(fused.__path__)]
    assert all(importlib.import_module(name) for name in names)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT_TRITON.format(names=names)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Triton cannot be imported" in done.stdout
