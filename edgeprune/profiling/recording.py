"""What a board tells in a call to its bench, as records of the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeprune.profiling.rounds import Slot

_TIMING = ("times_ms", "number", "stable", "cpu_share", "preempted")
_WHERE_KNOWN = ("pace_ns", "lost_s", "layers")


def recorded(event: Mapping[str, Any], number: int, attempt: int, order: Sequence[Slot]) -> dict[str, Any] | None:
    """The record of an event, without the seconds that it took; None where it has none.

    Args:
        event: As the board told it.
        number: Round of the call.
        attempt: At that round's stretches.
        order: What the call measures, in order.
    """
    kind = event.get("event")
    if kind == "ready":
        return {"kind": "call", "overhead_ms": event["overhead_ms"], "conditions": event["conditions"]}
    if kind == "unusable":
        return {"kind": "unusable", "id": event["id"], "message": event["message"]}
    if kind != "sample":
        return None
    slot = order[event["position"]]
    where = {"stretch": slot.stretch, "opens": slot.opens, "closes": slot.closes}
    timing = {name: event[name] for name in _TIMING} | {name: event[name] for name in _WHERE_KNOWN if event.get(name)}
    return {"kind": "sample", "round": number, "attempt": attempt, "id": slot.name, **where, **timing}
