"""Whether a folder may be a run's."""

from pathlib import Path

import pytest

from metro_megatron.checkpoint.files import TRIAL
from metro_megatron.errors import UserError
from metro_megatron.train.launch import prepare_run_folder
from metro_megatron.train.processes import LOCK


def test_what_a_start_that_was_killed_leaves_is_not_foreign(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    prepare_run_folder(run)
    for name in (LOCK, f"{TRIAL}0123", "run_config.yaml.0123456789ab.partial"):
        (run / name).touch()
    prepare_run_folder(run)
    (run / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"is not a run folder: it holds thesis\.tex but no run_config"):
        prepare_run_folder(run)
    (run / "run_config.yaml").touch()
    prepare_run_folder(run)
