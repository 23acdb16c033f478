"""One exported folder and one random BERT for all tests here, and no network."""

from pathlib import Path

import pytest

from tests.hf.conftest import export_folder, no_network, remote_code

__all__ = ["bert", "export_folder", "no_network", "remote_code"]


@pytest.fixture(scope="session")
def bert(export_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with the tokenizer of the export."""
    from tests.finetune.test_models import write_encoder

    return write_encoder("bert", export_folder, tmp_path_factory.mktemp("bert"))
