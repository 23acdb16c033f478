"""Kernels run here on the GPU where there is one, else in Triton's interpreter, which tests/conftest.py asks for."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from fused.dispatch import interpreted


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    """Where the kernels run, and where tests make tensors unless they say otherwise."""
    one = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with one, nullcontext() if one.type == "cuda" else interpreted():
        yield one
