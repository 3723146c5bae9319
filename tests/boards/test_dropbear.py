"""dropbear, the SSH server of small boards: what OpenSSH does is not what every server does."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.ssh import SshTransport
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.deploying import deploy
from edgeprune.deployment.status import rollback, status
from edgeprune.errors import AuthError, ConnectError, HostKeyError, RemoteError
from edgeprune.testing.dropbear import DropbearServer
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.transport import TransportConformance, assert_gone

pytestmark = pytest.mark.boards

SIZE = 4_000_000


@pytest.mark.slow  # the small board's server is the same program
class TestDropbear(TransportConformance):
    """With an SFTP server and coreutils."""

    @pytest.fixture
    def transport(self, dropbear: DropbearServer) -> Iterator[SshTransport]:
        with SshTransport("board", config=dropbear.config) as transport:
            yield transport


class TestSmallBoard(TransportConformance):
    """With BusyBox, and files that go through its shell."""

    @pytest.fixture
    def transport(self, small_board: DropbearServer) -> Iterator[SshTransport]:
        with SshTransport("board", config=small_board.config) as transport:
            yield transport


def test_small_board_is_what_it_says(small_board: DropbearServer, tmp_path: Path) -> None:
    with SshTransport("board", config=small_board.config) as transport:
        for name in ("sh", "head", "dd", "mv", "sha256sum"):
            link = transport.run(["sh", "-c", 'cmp "$(command -v "$1")" "$(command -v busybox)"', "sh", name])
            assert link.returncode == 0, f"{name} must be BusyBox's: {link.stderr!r}"
        (tmp_path / "file").write_bytes(b"content")
        transport.put(tmp_path / "file", f"{tmp_path}/copy")
        assert not transport._has_sftp
    assert small_board.public_keys()[0].startswith("ecdsa-sha2-nistp")


def through(link: FaultyLink, server: DropbearServer, tmp_path: Path) -> SshTransport:
    """The server behind a proxy that makes links bad."""
    known = tmp_path / "known_hosts of the proxy"
    known.write_text("".join(f"[{link.host}]:{link.port} {key}\n" for key in server.public_keys()))
    target = f"{server.user}@{link.host}:{link.port}"
    return SshTransport(target, identity=server.identity, known_hosts=known, connect_timeout_s=3)


@pytest.mark.parametrize("kind", ["dropbear", "small_board"])
def test_copy_goes_on_where_a_cut_stopped_it(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server: DropbearServer = request.getfixturevalue(kind)
    source, folder = tmp_path / "source", tmp_path / "on the board"
    source.write_bytes(random.Random(7).randbytes(SIZE))
    folder.mkdir()
    with FaultyLink(server.host, server.port) as link, through(link, server, tmp_path) as board:
        for cut_at in (0.4, 0.7):
            board.run(["true"])
            link.cut_after(int(cut_at * SIZE))
            with pytest.raises(ConnectError, match="goes on where it stopped"):
                board.put(source, f"{folder}/file")
            (partial,) = folder.iterdir()
            assert partial.read_bytes() == source.read_bytes()[: partial.stat().st_size]
            before, seen = link.sent_bytes, list[int]()
            left = partial.stat().st_size
            board.put(source, f"{folder}/file", progress=lambda done, total, seen=seen: seen.append(done))
            assert seen[0] >= left
            assert link.sent_bytes - before < SIZE - left + 200_000
            assert (folder / "file").read_bytes() == source.read_bytes()
            (folder / "file").unlink()


def test_link_that_falls_silent_is_noticed_and_leaves_nothing_running(
    small_board: DropbearServer, tmp_path: Path
) -> None:
    with FaultyLink(small_board.host, small_board.port) as link, through(link, small_board, tmp_path) as board:
        lines: list[str] = []

        def told(line: str) -> None:
            lines.append(line)
            link.black_hole()

        with pytest.raises(RemoteError):
            board.run(["sh", "-c", "echo $$; sleep 60; sleep 60"], timeout_s=2, on_line=told)
        link.mend()
    with SshTransport("board", config=small_board.config) as board:
        assert_gone(board, int(lines[0]), within_s=15)


def test_keys_that_do_not_fit(dropbear: DropbearServer, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text("")
    with (
        SshTransport(dropbear.target, identity=dropbear.identity, known_hosts=known) as unknown,
        pytest.raises(HostKeyError, match="must be known, found ssh-ed25519 SHA256:"),
    ):
        unknown.run(["true"])
    wrong = dropbear.folder / "wrong"
    if not wrong.exists():
        dropbear.new_key(wrong.name)
    with (
        SshTransport(dropbear.target, identity=wrong, known_hosts=dropbear.known_hosts) as refused,
        pytest.raises(AuthError, match="must accept one of your keys"),
    ):
        refused.run(["true"])


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_user_keys_of_other_types(dropbear: DropbearServer, kind: str) -> None:
    key = dropbear.new_key(f"{kind}_key", kind)
    with (dropbear.home / ".ssh" / "authorized_keys").open("a") as file:
        file.write(key.with_suffix(".pub").read_text())
    with SshTransport(dropbear.target, identity=key, known_hosts=dropbear.known_hosts) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"


def test_dropbear_as_jump_host(dropbear: DropbearServer, small_board: DropbearServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"Host *\n IdentityFile {dropbear.identity}\n IdentitiesOnly yes\n UserKnownHostsFile {dropbear.known_hosts}\n"
        " GlobalKnownHostsFile /dev/null\n"
    )
    with SshTransport(
        small_board.target,
        jump=dropbear.target,
        config=config,
        identity=small_board.identity,
        known_hosts=small_board.known_hosts,
    ) as transport:
        assert transport.run(["echo", "in"]).stdout == b"in\n"


@pytest.fixture
def url(small_board: DropbearServer, tmp_path: Path, host_with: Callable[[Path], None]) -> str:
    """The small board with an empty folder, and this environment's Python."""
    host_with(small_board.config)
    return f"ssh://board?python={quote(sys.executable)}&root={quote(str(tmp_path / 'board root; $(id)'))}"


@pytest.mark.slow
def test_small_board_is_deployed_to_and_rolled_back(tiny_artifacts: list[Artifact], url: str) -> None:
    with Board.open(url) as board:
        assert board.probe().architecture == os.uname().machine
    first = deploy(tiny_artifacts[0], url, rounds=1)
    assert first.bytes_sent == tiny_artifacts[0].size_bytes
    assert deploy(tiny_artifacts[0], url, rounds=1).bytes_sent == 0
    assert (
        deploy(tiny_artifacts[1], url, rounds=1, health="true", health_window_s=10, steady_s=0.5).previous
        == first.release
    )
    assert rollback(url).current is not None
    assert status(url).current.name == "net0"
