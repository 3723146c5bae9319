"""A kernel at which the program on the board ends again and again: it is left out, and the run goes on.

A runtime may crash on a kernel: an instruction that the processor lacks, a bug. The first time nobody knows that it was the
kernel: memory may have run out, or somebody may have killed it. So the journal says where that was, and the run ends; when the
same command goes on and the program ends there again, the kernel is left out as one that cannot be run alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def blamed(
    records: Iterable[Mapping[str, Any]], left: Sequence[str], kernels: Collection[str], how: str
) -> list[dict[str, Any]]:
    """What the journal shall say after the board's program has ended by itself.

    Args:
        records: Of the journal, in order.
        left: Ids that it had still to measure, in order; where it ended before it measured, the one that it was loading.
        kernels: Those that may be left out.
        how: A sentence on how it ended.

    Returns:
        Records: where it ended and, when it had ended there before, that this kernel is left out; none where that was no
        kernel.
    """
    if not left or left[0] not in kernels:
        return []
    name = left[0]
    found: list[dict[str, Any]] = [{"kind": "ended", "id": name}]
    if any(record["kind"] == "ended" and record["id"] == name for record in records):
        found.append({"kind": "unusable", "id": name, "message": f"twice when it was its turn, {how}"})
    return found
