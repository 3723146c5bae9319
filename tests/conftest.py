"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("edgeprune.testing")

from edgeprune.testing.sshd import MissingSshdError, OpenSshServer  # noqa: E402 (after the registration)


def pytest_configure() -> None:
    """Programs under test must feel Ctrl-C, also where the tests were started as a background job, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


ALONE = (
    "bad_input/test_board_that_refuses.py",
    "bad_input/test_boards.py",
    "bad_input/test_disturbed_profiles.py",
    "bad_input/test_interrupts.py",
    "loopback/test_deploy_over_ssh.py",
    "loopback/test_fleet_over_ssh.py",
    "unit/cli/test_deploy_verb.py",
    "unit/cli/test_main.py",
    "unit/cli/test_verbs.py",
    "unit/deployment/test_deploying.py",
    "unit/loop/test_closing_on_a_board.py",
    "unit/loop/test_int8_on_a_board.py",
    "unit/loop/test_pruning.py",
    "unit/loop/test_tiles_on_a_board.py",
    "unit/profiling/test_bench.py",
    "unit/profiling/test_comparing.py",
    "unit/profiling/test_measuring.py",
    "unit/profiling/test_run.py",
    "unit/profiling/test_run_again.py",
    "unit/profiling/test_run_conditions.py",
    "unit/profiling/test_run_refined.py",
    "unit/profiling/test_sustaining.py",
)
"""Files, and folders of files, whose tests time kernels, hold boards or count on who runs first: a neighbor disturbs them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark these tests; a path that is gone is an error."""
    here = Path(__file__).parent
    if gone := [path for path in ALONE if not (here / path).exists()]:
        raise pytest.UsageError(f"ALONE must name tests that are there, found {gone}.")
    for item in items:
        if any(item.path.is_relative_to(here / path) for path in ALONE):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSshServer]:
    """A real OpenSSH server on the loopback address that runs for the whole session; tests must not stop it."""
    try:
        server = OpenSshServer(tmp_path_factory.mktemp("sshd"))
    except MissingSshdError as error:
        if os.environ.get("EDGEPRUNE_REQUIRE_SSHD") == "1":
            pytest.fail(f"EDGEPRUNE_REQUIRE_SSHD=1, but: {error}")
        pytest.skip(str(error))
    with server:
        yield server
