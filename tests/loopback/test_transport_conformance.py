"""The built-in transports against the suite that all transports must pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgeprune.boards.ssh import SshTransport
from edgeprune.testing.sshd import OpenSshServer
from edgeprune.testing.transport import TransportConformance


@pytest.mark.loopback
class TestSshTransport(TransportConformance):
    """Over a real OpenSSH server."""

    @pytest.fixture
    def transport(self, sshd: OpenSshServer) -> Iterator[SshTransport]:
        with SshTransport("board", config=sshd.config) as transport:
            yield transport
