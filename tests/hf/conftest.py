"""One exported folder for all tests here, and no network."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is loaded


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:  # by which a test starts ranks
            raise AssertionError("a test of an exported folder reached for the network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.hf.pair import write_export

    return write_export(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def remote_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders load by their own code, as without this package; it is cached in a folder of the tests."""
    from transformers import dynamic_module_utils
    from transformers.models.auto import configuration_auto, modeling_auto

    from metro_megatron.hf.configuration_metro import MODELS, MetroConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)  # imported from another test's folder
        patch.delitem(configuration_auto.CONFIG_MAPPING._extra_content, MetroConfig.model_type)
        for auto in (getattr(modeling_auto, name) for name in MODELS if name.startswith("Auto")):
            patch.delitem(auto._model_mapping._extra_content, MetroConfig)
        yield
