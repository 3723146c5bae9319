"""Where two devices and runtimes differ that a latency table and a board are of, by what a person knows them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_VERSION, _HASH = "runtime_version", "runtime_sha256"
_LONGEST, _HASH_CHARS = 60, 12


def differing(held: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Fields in which two identities (`Fingerprint.identity`) differ, the runtime and its version first.

    The hash of the runtime's library is only named where its version does not say already that it is another one.

    Args:
        held: Of a table.
        found: Of a board.
    """
    names = {name for name in {*held, *found} if held.get(name) != found.get(name)}
    if names & {"runtime", _VERSION}:
        names.discard(_HASH)
    return sorted(names, key=lambda name: (name != "runtime", name != _VERSION, name))


def told(name: str, value: Any) -> str | None:
    """A field's value for a sentence, None where it is too long for one: the field's name says enough then."""
    if value is None:
        return "not told"
    text = str(value)[:_HASH_CHARS] if name == _HASH else str(value)
    return text if len(text) <= _LONGEST else None
