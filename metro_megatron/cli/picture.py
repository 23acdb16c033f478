"""Whether a picture can be drawn where an option says, asked before the work that it shall show."""

from __future__ import annotations

import os
from pathlib import Path

from metro_megatron.cli.command_line import describe_os_error
from metro_megatron.errors import UserError


def refuse_picture(output: Path) -> None:
    """Raise UserError where matplotlib is missing, draws nothing of the name's ending, or cannot write there."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UserError("--picture needs matplotlib; pip install 'metro_megatron[demo]'") from error
    if output.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"--picture {output}: its ending is none of a picture; name a .png, .svg or .pdf file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--picture {output}: {describe_os_error(error)}; name another file") from error
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"--picture {output}: cannot be written; name another file")
