import sys
from pathlib import Path

import pytest

from metro_megatron.cli.picture import refuse_picture
from metro_megatron.errors import UserError


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_picture(tmp_path / "new" / "step.PNG")
    with pytest.raises(UserError, match=r"its ending is none of a picture; name a .png"):
        refuse_picture(tmp_path / "step.mp4")
    with pytest.raises(UserError, match=r"/proc/of/step.png: .*; name another file"):
        refuse_picture(Path("/proc/of/step.png"))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        refuse_picture(tmp_path / "folder.png")
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(UserError, match=r"pip install 'metro_megatron\[demo\]'"):
        refuse_picture(tmp_path / "step.png")
