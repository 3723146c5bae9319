"""Whether a latency table is one to prune with, and what an imported one would have to be told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.backends import registry as backends

if TYPE_CHECKING:
    from edgeprune.latency.table import LatencyTable

_FACTS = {"architecture": "architecture=aarch64", "isa": """'isa=["asimd"]'"""}
"""What engines are compiled for, as options of an import."""


def unprunable(table: LatencyTable) -> str | None:
    """What `prune` would refuse a table for, and how to import it otherwise, in a sentence; None where it would not."""
    lacking = [f"--fact {option}" for fact, option in _FACTS.items() if fact not in table.header["identity"]]
    runtime = str(table.header["runtime"])
    wanted = []
    if lacking:
        wanted.append(f"the device's facts, e.g. {' '.join(lacking)}")
    if runtime not in backends.names():
        wanted.append(f"the backend that it is of, --runtime {'|'.join(backends.names())}")
    return f"prune would refuse this table: its import must say {', and '.join(wanted)}" if wanted else None
