"""Processes that a launcher (torchrun, accelerate launch) starts side by side."""

from __future__ import annotations

import os

from slimlmm.errors import UserError


def processes() -> int:
    """Return how many processes a launcher says that it has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse() -> None:
    """Refuse to be one of several processes.

    Raises:
        UserError: with their number.
    """
    if processes() > 1:
        raise UserError(
            f"a launcher started {processes()} processes of this command (WORLD_SIZE), but a run is made by one. Start it "
            "without torchrun or accelerate launch; several runs go side by side, each in a folder and on a GPU of its own "
            "(CUDA_VISIBLE_DEVICES)."
        )
