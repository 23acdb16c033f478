"""Kernels run in Triton's interpreter here, which must be asked for before fused is imported."""

import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module", autouse=True)
def kernels_in_the_interpreter() -> Iterator[None]:
    from fused.dispatch import interpreted

    with interpreted():
        yield
