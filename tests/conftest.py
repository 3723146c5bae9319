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
    "bad_input",
    "loopback",
    "quickstart",
    "unit/boards",
    "unit/cli",
    "unit/deployment",
    "unit/loop",
    "unit/profiling",
)
"""Folders whose tests time kernels, hold boards or count on who runs first: their neighbor would be in the way."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of these folders."""
    here = Path(__file__).parent
    for item in items:
        if any(item.path.is_relative_to(here / folder) for folder in ALONE):
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
