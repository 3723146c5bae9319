"""What the on-board probe found, as a `Fingerprint`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeprune.spec import Fingerprint

_UNKNOWN = "unknown"


def from_facts(facts: Mapping[str, Any]) -> Fingerprint:
    """Build a fingerprint from the probe's JSON, or from ``dataclasses.asdict`` of one that was stored.

    Boards differ in what they tell, so a missing fact is ``"unknown"``, 0, empty or None, and never an error.
    """
    return Fingerprint(
        architecture=_text(facts, "architecture"),
        cpu_model=_text(facts, "cpu_model"),
        isa=tuple(sorted(_items(facts, "isa"))),
        cores=int(facts.get("cores") or 1),
        caches_bytes={str(name): int(size) for name, size in _fields(facts, "caches_bytes").items()},
        memory_bytes=int(facts.get("memory_bytes") or 0),
        os=_text(facts, "os"),
        kernel=_text(facts, "kernel"),
        libc=_text(facts, "libc"),
        python=_text(facts, "python"),
        runtimes={
            str(name): {str(key): str(value) for key, value in entry.items()}
            for name, entry in _fields(facts, "runtimes").items()
        },
        power_mode=facts.get("power_mode"),
        governor=facts.get("governor"),
        free_disk_bytes=int(facts.get("free_disk_bytes") or 0),
        load=float(facts.get("load") or 0.0),
        sensors=_items(facts, "sensors"),
        disturbances=_items(facts, "disturbances"),
        absences=_items(facts, "absences"),
        facts=dict(_fields(facts, "facts")),
    )


def _text(facts: Mapping[str, Any], name: str) -> str:
    return str(facts.get(name) or _UNKNOWN)


def _items(facts: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return tuple(str(item) for item in facts.get(name) or ())


def _fields(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = facts.get(name)
    return value if isinstance(value, Mapping) else {}
