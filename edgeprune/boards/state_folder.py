"""Where this machine keeps what it has learned of boards."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

VARIABLE = "EDGEPRUNE_STATE"
"""Environment variable with another folder for this state."""


def folder() -> Path:
    """Where the state lies."""
    told = os.environ.get(VARIABLE)
    return Path(told) if told else platformdirs.user_state_path("edgeprune")
