"""Standard output is ours alone, whatever the solver prints."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from edgeprune.allocation.solver import solve

PROGRAM = """
import ctypes, sys
from edgeprune.allocation import solver
print("before")
with solver._told_as_errors():
    ctypes.CDLL(None).printf(b"of the solver\\n")
print("after")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="C's buffers are flushed in another way there")
def test_what_the_solver_prints_is_not_on_standard_output() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ran.stdout == "before\nafter\n"
    assert ran.stderr == "of the solver\n"


def test_a_closed_standard_output_is_no_failure() -> None:
    program = "import os; os.close(1); from edgeprune.allocation import solver\nwith solver._told_as_errors(): pass"
    assert subprocess.run([sys.executable, "-c", program], check=True).returncode == 0


def test_the_program_is_solved() -> None:
    found = solve(np.array([-1.0, -2.0]), integrality=np.ones(2), bounds=(0, 1))
    assert found.x.tolist() == [1.0, 1.0]
