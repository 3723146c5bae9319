"""A kernel at which the program on the board ends again and again: it is left out, and the run goes on.

A runtime may crash on a kernel: an instruction that the processor lacks, a bug. The first time nobody knows that it was the
kernel: memory may have run out, or somebody may have killed it. So the journal says where that was, and the run ends; when the
same command goes on and the program ends there again, the kernel is left out as one that cannot be run alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


class Blame:
    """Hears what the board tells in one call, and says which kernel it was at should its program end by itself.

    Args:
        kernels: Ids of those that may be left out.
        order: Ids of what the call measures, in order.
    """

    def __init__(self, kernels: Collection[str], order: Sequence[str] = ()) -> None:
        self._kernels, self._order = kernels, order
        self._loading: str | None = None
        self._place: int | None = None
        self._unusable: set[str] = set()

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take an event of the call into account, or a line of what the board kept of it."""
        kind = event.get("event")
        if kind == "loading":
            self._loading = event["id"]
        elif kind == "unusable":
            self._unusable.add(event["id"])
        elif kind == "ready":
            self._place = 0
        elif kind == "sample":
            self._place = event["position"] + 1

    def records(self, journal: Iterable[Mapping[str, Any]], how: str) -> list[dict[str, Any]]:
        """What the journal shall say after the board's program has ended by itself.

        Args:
            journal: Its records so far, in order.
            how: A sentence on how it ended.

        Returns:
            Where it ended and, when it had ended there before, that this kernel is left out; none where that was no kernel.
        """
        if self._place is None:
            # Before it measures it only tells what it loads.
            name = self._loading
        else:
            name = next((one for one in self._order[self._place :] if one not in self._unusable), None)
        if name is None or name not in self._kernels:
            return []
        found: list[dict[str, Any]] = [{"kind": "ended", "id": name}]
        if any(record["kind"] == "ended" and record["id"] == name for record in journal):
            found.append({"kind": "unusable", "id": name, "message": f"twice when it was its turn, {how}"})
        return found
