"""Where a verb may write a latency table."""

from __future__ import annotations

import glob
from pathlib import Path

from edgeprune.errors import ConfigError


def require_free(out: Path, *, replace: bool, extended: Path | None = None) -> None:
    """Refuse to write over a table that took minutes on a board, unless that is asked for; asked before the long steps.

    Args:
        out: Table to write.
        replace: It may be there already.
        extended: A table that goes on in `out`, which may be the same file.

    Raises:
        ConfigError: `out` is there, nobody said that it may be replaced, and no interrupted run of it goes on.
    """
    if replace or not out.exists():
        return
    if extended is not None and extended.exists() and out.samefile(extended):
        return
    # A run of this table that was interrupted, maybe at its very end, goes on.
    if any(out.parent.glob(f"{glob.escape(out.name)}.*.jsonl")):
        return
    raise ConfigError(
        f"the table to write must not be there yet, found {out}.",
        hint=f"--table {out} goes on in it, --replace writes over it, --out another.parquet leaves it",
    )
