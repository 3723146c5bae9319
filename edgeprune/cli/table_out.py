"""Where a verb may write a latency table."""

from __future__ import annotations

import glob
from pathlib import Path

from edgeprune.errors import ConfigError, EdgepruneError


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


def require_not_measured(out: Path, *, replace: bool) -> None:
    """Refuse to write an import over a table that was measured; one import over another is done again in seconds.

    Raises:
        ConfigError: What is there is no import, and nobody said that it may be replaced.
    """
    from edgeprune.latency.table import LatencyTable

    if replace or not out.exists():
        return
    try:
        imported = LatencyTable.load(out).header.get("label") == "imported"
    except EdgepruneError:
        imported = False
    if not imported:
        raise ConfigError(
            f"the table to write must not be there yet, or be an import as well, found {out}.",
            hint="--replace writes over it, --out another.parquet leaves it",
        )
