"""Connections to the loopback server, straight and through a proxy that makes links bad."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edgeprune.boards.ssh import SshTransport
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import MissingSshdError, OpenSshServer


@pytest.fixture
def board(sshd: OpenSshServer) -> Iterator[SshTransport]:
    """The loopback server as a board, over a good link."""
    with SshTransport("board", config=sshd.config) as transport:
        yield transport


@pytest.fixture
def link(sshd: OpenSshServer) -> Iterator[FaultyLink]:
    """A proxy in front of the loopback server."""
    with FaultyLink(sshd.host, sshd.port) as link:
        yield link


@pytest.fixture
def far_board(sshd: OpenSshServer, link: FaultyLink, tmp_path: Path) -> Iterator[SshTransport]:
    """The loopback server as a board, through the proxy."""
    known = tmp_path / "known_hosts of the proxy"
    known.write_text("".join(f"[{link.host}]:{link.port} {key}\n" for key in sshd.public_keys()))
    with SshTransport(
        f"{sshd.user}@{link.host}:{link.port}", identity=sshd.identity, known_hosts=known, connect_timeout_s=3
    ) as transport:
        yield transport


@pytest.fixture
def new_server(sshd: OpenSshServer, tmp_path: Path) -> Iterator[Callable[..., OpenSshServer]]:
    """Starts further servers, with other keys or settings, for one test."""
    with ExitStack() as servers:

        def start(**options: object) -> OpenSshServer:
            folder = tmp_path / f"server {len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            try:
                return servers.enter_context(OpenSshServer(folder, **options))
            except MissingSshdError as error:  # the session's server was there, so this one must be
                pytest.fail(str(error))

        yield start
