"""Short looks at a board before anything is decided: one round, of which no table holds anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import LatencyError
from edgeprune.profiling.measuring import MeasuredRun, measure

if TYPE_CHECKING:
    from edgeprune.boards.board import Board
    from edgeprune.profiling.setting import Setting

AGAIN_AFTER_S = (3.0, 12.0)
"""After how many seconds each a board is looked at again that is not what it should be: a neighbor's burst passes, a changed
clock does not."""


def look(
    board: Board,
    setting: Setting,
    engines: Mapping[str, bytes | Path],
    kernels: Sequence[str] = (),
    samples: int = 3,
) -> MeasuredRun:
    """Time engines in one round, with nothing repeated.

    Args:
        board: Where.
        setting: What is profiled, and how.
        engines: Id to engine.
        kernels: Ids of those that are single kernels.
        samples: Samples of each.

    Raises:
        RemoteError: The board was lost.
        BackendError: An engine does not load on the board.
    """
    return measure(
        board,
        engines,
        runtime=setting.runtime,
        threads=setting.threads,
        rounds=1,
        samples=samples,
        max_repeats=0,
        kernels=kernels,
        wait_s=setting.wait_s,
        timing_s=None if setting.layer_times is None else setting.layer_times.timing_s,
    )


def accepted(looked: Callable[[], None], tell: Callable[[str], None]) -> None:
    """Look until what is seen is accepted, at most once more than `AGAIN_AFTER_S` has entries.

    Args:
        looked: Looks once, and raises what refuses what it saw.
        tell: Told why there is a pause.

    Raises:
        LatencyError: What the last look raised.
    """
    for pause_s in AGAIN_AFTER_S:
        try:
            return looked()
        except LatencyError:
            tell(f"the board is not what it was when the table was made; looking again in {pause_s:.0f} s")
            time.sleep(pause_s)
    return looked()
