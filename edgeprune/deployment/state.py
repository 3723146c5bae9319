"""What this machine last knew of each board, so that `status` can answer while a board is away."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.boards.state_folder import folder
from edgeprune.files import write_text

_log = logging.getLogger("edgeprune.deployment.state")


def remember(board: str, status: Mapping[str, Any]) -> None:
    """Keep the result of the board's verb ``status``; a machine whose disk is full or read-only goes without."""
    path = _path(board)
    record = {"board": board, "time_s": time.time(), "status": dict(status)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record), mode=0o600)
    except OSError as error:
        _log.warning("what board %s runs could not be remembered in %s: %s", board, path, error)


def recall(board: str) -> tuple[dict[str, Any], float] | None:
    """(result of the board's last ``status``, its age in seconds), or None."""
    try:
        record = json.loads(_path(board).read_text(encoding="utf-8"))
        return dict(record["status"]), max(0.0, time.time() - float(record["time_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _path(board: str) -> Path:
    # An address with its options can be longer than a file name may be.
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", board)[:40]
    return folder() / "boards" / f"{readable}-{hashlib.sha256(board.encode()).hexdigest()[:16]}.json"
