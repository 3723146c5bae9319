"""Mixed-integer programs by HiGHS, through SciPy, with nothing but our own output on standard output."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_OUT, _ERR = 1, 2


def solve(objective: Any, **problem: Any) -> Any:
    """`scipy.optimize.milp`, whose solver's stray lines go to standard error."""
    from scipy.optimize import milp

    with _told_as_errors():
        return milp(objective, **problem)


@contextmanager
def _told_as_errors() -> Iterator[None]:
    """HiGHS prints a line of debugging in some solves, ``transformNewIntegerFeasibleSolution``, whatever the options say: it
    would stand in the middle of what another program reads from us.
    """
    try:
        kept = os.dup(_OUT)
    except OSError:  # Closed: there is nothing to keep clean.
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(_ERR, _OUT)
        yield
    finally:
        # What C has printed is still in its own buffer.
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, _OUT)
        os.close(kept)
