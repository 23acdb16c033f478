"""One exported folder for all tests here, and no network."""

from tests.hf.conftest import export_folder, no_network, remote_code

__all__ = ["export_folder", "no_network", "remote_code"]
