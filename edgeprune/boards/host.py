"""What this machine's processor can do, where that is asked without probing it as a board."""

from __future__ import annotations

from pathlib import Path


def host_isa() -> tuple[str, ...]:
    """Instruction set flags of this machine, as Linux names them; empty where they cannot be read."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else ():
        if line.startswith(("flags", "Features")):
            return tuple(line.partition(":")[2].split())
    return ()
