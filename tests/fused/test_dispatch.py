import importlib
import os
import pkgutil
import subprocess
import sys
import threading

import pytest
import torch

import fused
from fused import dispatch
from fused.dispatch import describe, reference_only, use_kernel

CPU = torch.device("cpu")


def test_kernels_need_a_gpu_or_a_test():
    x = torch.zeros(1)
    assert use_kernel("layer_norm", x) and use_kernel("layer_norm", x, x.half(), x.bfloat16())
    assert not use_kernel("layer_norm", x, x.double())
    assert "interpreter" in describe(CPU)


def test_reference_only_nests_and_holds_in_every_thread():
    seen = []
    with reference_only():
        with reference_only():
            pass
        thread = threading.Thread(target=lambda: seen.append(use_kernel("layer_norm", torch.zeros(1))))
        thread.start()
        thread.join()
        assert "asks for them" in describe(CPU)
    assert seen == [False] and use_kernel("layer_norm", torch.zeros(1))


def test_single_operators_take_their_references():
    with reference_only("attention", "layer_norm"):
        assert not use_kernel("attention", torch.zeros(1)) and use_kernel("softmax_dropout", torch.zeros(1))
        assert "interpreter" in describe(CPU)
    with pytest.raises(ValueError, match="no operator is called flash; there are attention, "), reference_only("flash"):
        pass


def test_the_references_come_back_after_an_error():
    with pytest.raises(KeyError), reference_only():
        raise KeyError
    assert use_kernel("layer_norm", torch.zeros(1))


@pytest.mark.parametrize("capability, wanted", [((7, 5), "8.0 and this device has 7.5"), ((9, 0), "on A GPU")])
def test_gpus_are_described(monkeypatch, capability, wanted):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    device = torch.device("cuda", 0)
    assert wanted in describe(device)
    assert dispatch.architecture(device) == (90 if capability == (9, 0) else 80)


def test_the_interpreter_does_not_train():
    assert "unset it" in describe(torch.device("cuda", 0))


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
