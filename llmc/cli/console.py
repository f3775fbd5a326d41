"""Where tables are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

FILE_WIDTH = 160  # characters


def console() -> Console:
    """A console on standard output: as wide as the terminal, and in a file or pipe wide enough for whole words."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, FILE_WIDTH))
