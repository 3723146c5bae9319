"""Boards that are no toys: other SSH servers, hosts behind a bastion, another architecture. Each is a real part of this machine.

What this machine lacks for one is told in the sentence with which its tests are skipped; with EDGEPRUNE_REQUIRE_BOARDS=1 they
fail instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest

from edgeprune.testing.arm64 import CACHE_VARIABLE, Arm64Board, userland
from edgeprune.testing.dropbear import DropbearServer
from edgeprune.testing.namespaces import HiddenFleet
from edgeprune.testing.ssh_server import MissingPartError

_Made = TypeVar("_Made")


def made_or_skipped(make: Callable[[], _Made]) -> _Made:
    """What `make` returns; where this machine cannot, the test is skipped."""
    try:
        return make()
    except MissingPartError as error:
        if os.environ.get("EDGEPRUNE_REQUIRE_BOARDS") == "1":
            pytest.fail(f"EDGEPRUNE_REQUIRE_BOARDS=1, but: {error}")
        pytest.skip(f"this test board cannot be had: {error}")


@pytest.fixture(scope="session")
def dropbear(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DropbearServer]:
    """dropbear with an SFTP server and this machine's programs."""
    with made_or_skipped(lambda: DropbearServer(tmp_path_factory.mktemp("dropbear"))) as server:
        yield server


@pytest.fixture(scope="session")
def small_board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DropbearServer]:
    """dropbear as small boards have it: BusyBox, a host key that is not Ed25519, no SFTP server."""
    folder = tmp_path_factory.mktemp("small")
    with made_or_skipped(lambda: DropbearServer(folder, key_types=("ecdsa",), busybox=True, sftp=False)) as server:
        yield server


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HiddenFleet]:
    """Boards behind a bastion."""
    with ExitStack() as ends:
        hidden = made_or_skipped(lambda: HiddenFleet(tmp_path_factory.mktemp("fleet")))
        yield made_or_skipped(lambda: ends.enter_context(hidden))


@pytest.fixture(scope="module")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arm64Board]:
    """An arm64 board with nothing of edgeprune's on it yet."""
    cache = os.environ.get(CACHE_VARIABLE)
    lower = made_or_skipped(lambda: userland(Path(cache) if cache else tmp_path_factory.mktemp("cache")))
    with made_or_skipped(lambda: Arm64Board(tmp_path_factory.mktemp("arm64"), lower, cpu="neoverse-n1")) as board:
        yield board
