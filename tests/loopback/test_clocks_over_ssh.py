"""Clocks of a board behind a real OpenSSH server are put back when the link is lost, and when the host is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.device_types import device_type
from edgeprune.boards.ssh import SshTransport
from edgeprune.errors import EdgepruneError
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import OpenSshServer

JETSON_CLOCKS = """#!/bin/sh
case "$1" in
    --show) cat "{clocks}" ;;
    --store) cp "{clocks}" "$2" ;;
    --restore) cp "$2" "{clocks}" ;;
    "") echo locked > "{clocks}" ;;
esac
"""
HOST = """
import sys, time
from pathlib import Path
from edgeprune.boards.board import Board
from edgeprune.boards.device_types import device_type
from edgeprune.boards.ssh import SshTransport

transport = SshTransport("board", config=Path(sys.argv[1]))
board = Board(transport, name="orin", python=sys.executable, root=sys.argv[2], device=device_type("jetson-orin-nano"))
with board.hold("test"), board.lock_clocks():
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def clocks(tmp_path: Path) -> Path:
    """A file in place of the clocks, and the commands that lock it in ``bin``."""
    path = tmp_path / "clocks"
    path.write_text("former\n")
    (tmp_path / "bin").mkdir()
    scripts = {"jetson_clocks": JETSON_CLOCKS.format(clocks=path), "sudo": '#!/bin/sh\nshift\nexec "$@"\n'}
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    return path


@pytest.fixture
def server(new_server: Callable[..., OpenSshServer], clocks: Path) -> OpenSshServer:
    """A server whose commands find those of the fake board first."""
    return new_server(environment={"PATH": f"{clocks.parent / 'bin'}:{os.environ['PATH']}"})


def restored(clocks: Path) -> None:
    end = time.monotonic() + 15
    while clocks.read_text() != "former\n":
        assert time.monotonic() < end, "clocks were not put back within 15 s"
        time.sleep(0.05)


def test_host_that_is_killed(server: OpenSshServer, clocks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOST, str(server.config), str(tmp_path / "board")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "locked\n"
        assert clocks.read_text() == "locked\n"
        host.send_signal(signal.SIGKILL)
    restored(clocks)


def test_link_that_is_lost(server: OpenSshServer, clocks: Path, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts of the proxy"
    with FaultyLink(server.host, server.port) as link:
        known.write_text("".join(f"[{link.host}]:{link.port} {key}\n" for key in server.public_keys()))
        address = f"{server.user}@{link.host}:{link.port}"
        transport = SshTransport(address, identity=server.identity, known_hosts=known, connect_timeout_s=3)
        device = device_type("jetson-orin-nano")
        with Board(transport, name="orin", python=sys.executable, root=str(tmp_path / "board"), device=device) as board:
            with board.lock_clocks() as told:
                link.cut()
                restored(clocks)
                with pytest.raises(EdgepruneError, match="clock lock was lost"):
                    board._require_held()
                link.mend()
                # The next timed call locks again.
                board._clocks.renew()
                assert clocks.read_text() == "locked\n"
            assert told["restored"] is True
    assert clocks.read_text() == "former\n"
