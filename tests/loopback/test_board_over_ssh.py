"""The board of the unit tests once more, this time behind a real OpenSSH server."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.config import BoardConfig, BoardEntry
from edgeprune.boards.known_hosts import fingerprint
from edgeprune.boards.runner_package import runner_package
from edgeprune.errors import BoardBusyError, ConfigError, HostKeyError, IncompatibleTargetError, TransferError
from edgeprune.profiling.energy import measure_energy
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import OpenSshServer

pytestmark = pytest.mark.loopback

# An ONNX model of one Identity node on one float.
IDENTITY = base64.b64decode("CAc6NwoQCgF4EgF5IghJZGVudGl0eRIBZVoPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEA0=")
HOLDER = """
import sys
from edgeprune.boards.board import Board
with Board.open(sys.argv[1]) as board, board.hold("a test of locks"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def root(sshd: OpenSshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder on the board for this test alone."""
    monkeypatch.setenv("EDGEPRUNE_SSH_CONFIG", str(sshd.config))
    monkeypatch.setenv("EDGEPRUNE_CONFIG", str(tmp_path / "boards.toml"))
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "board root"))
    return tmp_path / "board root"


@pytest.fixture
def url(root: Path) -> str:
    return f"ssh://board?python={quote(sys.executable)}&root={quote(str(root))}"


@pytest.fixture
def board(url: str) -> Iterator[Board]:
    with Board.open(url) as opened:
        yield opened


def pinned(sshd: OpenSshServer) -> str:
    """Fingerprint of the server's key, as a user would have accepted it."""
    return fingerprint(base64.b64decode(sshd.public_keys()[0].split()[1]))


def hold_soon(board: Board, timeout_s: float = 10.0) -> None:
    """Hold and release, waiting for a lock that is about to go."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with board.hold("next"):
                return
        except BoardBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def start_holder(spec: str) -> subprocess.Popen[bytes]:
    """Another process that holds a board until its input ends."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_a_look_at_a_board_leaves_no_file_there(board: Board, root: Path) -> None:
    with board.untouched():
        assert board.facts()["python"]
        assert board.call("status", {})["releases"] == []
    assert not root.exists()
    board.facts()
    assert (root / "runner").is_dir()


def test_the_board_is_what_the_same_machine_is_locally(board: Board, root: Path) -> None:
    assert board.name == "board"
    assert board.root == str(root)
    over_ssh = board.probe()
    with Board.open("local") as local:
        directly = local.probe()
    assert over_ssh.identity("onnxruntime") == directly.identity("onnxruntime")
    assert over_ssh.runtimes == directly.runtimes
    assert over_ssh.facts["python_executable"] == sys.executable


def test_a_python_may_be_given_below_the_board_s_home(root: Path) -> None:
    below = os.path.relpath(sys.executable, Path.home())
    with Board.open(f"ssh://board?python={quote(f'~/{below}')}&root={quote(str(root))}") as board:
        assert board.python == f"{Path.home()}/{below}"
        assert Path(board.probe().facts["python_executable"]).samefile(sys.executable)


def test_a_configured_board_is_opened_by_its_name_with_its_type_and_pinned_key(
    sshd: OpenSshServer, root: Path, tmp_path: Path
) -> None:
    entry = BoardEntry(
        ssh=sshd.target,
        type="x86-64-host",
        python=sys.executable,
        root=str(root),
        host_key=pinned(sshd),
        identity=str(sshd.identity),
    )
    BoardConfig().add("lab", entry)
    with Board.open("lab") as board:
        assert board.name == "lab"
        assert board.device is not None
        assert board.device.name == "x86-64-host"
        assert board.call("store", {"action": "missing", "blobs": {}})["missing"] == []
    BoardConfig().add("lab", entry.model_copy(update={"host_key": "SHA256:" + "A" * 43}), replace=True)
    with pytest.raises(HostKeyError):
        Board.open("lab")


def test_the_root_is_in_the_home_folder_of_the_board_s_user_by_default(root: Path) -> None:
    with Board.open(f"ssh://board?python={quote(sys.executable)}") as board:
        assert board.root == str(Path.home() / ".edgeprune")


def test_a_board_without_python_is_told_what_to_do(sshd: OpenSshServer, root: Path) -> None:
    with pytest.raises(
        IncompatibleTargetError, match=r"needs python >= 3\.6, the board has none at /nowhere/python3"
    ) as caught:
        Board.open("ssh://board?python=/nowhere/python3")
    assert f"install python3 on {sshd.target}, or name another one with --python" in str(caught.value)


def test_an_identity_that_is_missing_is_told_before_anything_is_tried(root: Path) -> None:
    with pytest.raises(ConfigError, match="identity must be a private key file"):
        Board.open("ssh://board?identity=/nowhere/key")


def test_the_runner_is_uploaded_once(board: Board, root: Path, url: str) -> None:
    board.call("store", {"action": "missing", "blobs": {}})
    path = root / "runner" / runner_package().name
    before = path.stat()
    with Board.open(url) as again:
        again.call("store", {"action": "missing", "blobs": {}})
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_events_and_typed_failures_come_through(board: Board) -> None:
    events: list[dict[str, Any]] = []
    # Over a link the runner's input ends with the request, so the lock goes at once.
    assert board.call("lock", {"purpose": "größer"}, on_event=events.append) == {"released": True}
    assert [event["holder"]["purpose"] for event in events if event["event"] == "held"] == ["größer"]
    with pytest.raises(TransferError, match="must have been uploaded, found nothing"):
        board.call("store", {"action": "adopt", "blobs": ["0" * 64]})


def test_a_file_is_pushed_once_and_is_whole(board: Board, root: Path) -> None:
    content = os.urandom(3_000_000)
    told: list[tuple[int, int]] = []
    sha256 = board.push(content, progress=lambda done, total: told.append((done, total)))
    assert (root / "store" / sha256).read_bytes() == content
    assert told[-1] == (len(content), len(content))
    told.clear()
    board.push(content, progress=lambda done, total: told.append((done, total)))
    assert told == [(len(content), len(content))]
    assert list((root / "incoming").iterdir()) == []


@pytest.mark.parametrize("first", ["ssh", "local"])
def test_one_board_is_held_once_however_it_is_reached(board: Board, url: str, first: str) -> None:
    holder = start_holder(url if first == "ssh" else "local")
    try:
        with (
            Board.open("local" if first == "ssh" else url) as other,
            pytest.raises(BoardBusyError, match=rf"process {holder.pid}, a test of locks"),
            other.hold("mine"),
        ):
            pytest.fail("the board was held twice")
    finally:
        holder.communicate(timeout=20)
    hold_soon(board)


def test_the_lock_goes_with_a_host_that_is_killed(board: Board, url: str) -> None:
    holder = start_holder(url)
    holder.kill()
    holder.wait(10)
    hold_soon(board)


def test_the_lock_goes_with_the_link(sshd: OpenSshServer, root: Path) -> None:
    with FaultyLink(sshd.host, sshd.port) as link:
        options = {
            "python": sys.executable,
            "root": str(root),
            "identity": str(sshd.identity),
            "host_key": pinned(sshd),
        }
        url = f"ssh://{sshd.user}@{link.host}:{link.port}?{urlencode(options)}"
        with Board.open(url) as board, Board.open("local") as local, board.hold("will be cut off"):
            with pytest.raises(BoardBusyError, match="will be cut off"), local.hold("mine"):
                pytest.fail("the board was held twice")
            link.cut()
            hold_soon(local)
            # The next call comes over a new link and brings the lock with it.
            assert board.call("store", {"action": "missing", "blobs": {}})["missing"] == []
            with pytest.raises(BoardBusyError, match="will be cut off"), local.hold("mine"):
                pytest.fail("the board was held twice")


def test_energy_that_is_interrupted_leaves_no_program_on_the_board(board: Board, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    meter = f"echo $$ >> {pids}; while echo 3.5; do sleep 0.02; done"

    def interrupt(done: int, total: int, left_s: float, message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_energy(
            board, {"empty": IDENTITY}, meter=meter, replay_s=30, idle_s=0.2, settle_s=0.05, progress=interrupt
        )
    started = pids.read_text().split()
    assert len(started) >= 2, "looked at once, then followed"
    end = time.monotonic() + 10
    while any(Path("/proc", pid).exists() for pid in started) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in started if Path("/proc", pid).exists()]
