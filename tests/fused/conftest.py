"""Kernels run here on the GPU where there is one, else in Triton's interpreter, which tests/conftest.py asks for."""

from collections.abc import Iterator

import pytest
import torch

from fused.dispatch import interpreted


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with torch.device("cuda") if torch.cuda.is_available() else interpreted():
        yield
