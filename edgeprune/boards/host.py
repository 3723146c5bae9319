"""What this machine's processor is and can do, where that is asked without probing it as a board."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def host_isa() -> tuple[str, ...]:
    """Instruction set flags of this machine, as Linux names them; empty where they cannot be read."""
    for line in _lines():
        if line.startswith(("flags", "Features")):
            return tuple(line.partition(":")[2].split())
    return ()


def host_cpu_model() -> str:
    """Name of this machine's processor, as a probe of it tells it; ``"unknown"`` where only a probe does (ARM)."""
    if platform.machine() == "x86_64":
        for line in _lines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip() or "unknown"
    return "unknown"


def _lines() -> list[str]:
    return _CPUINFO.read_text(errors="replace").splitlines() if _CPUINFO.exists() else []
