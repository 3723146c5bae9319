"""A board: the runner's verbs, its lock, and its store, all of them real."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.local import LocalTransport
from edgeprune.boards.runner_events import error_of
from edgeprune.boards.runner_package import runner_package
from edgeprune.errors import (
    BoardBusyError,
    BoardFullError,
    BudgetInfeasibleError,
    CommandError,
    ConfigError,
    ConnectError,
    IncompatibleTargetError,
    RemoteTimeoutError,
    TransferError,
    UnknownBoardError,
)

HOLDER = """
import sys, time
from edgeprune.boards.board import Board
with Board.open("local") as board, board.hold("a test of locks"):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder() -> subprocess.Popen[bytes]:
    """Another process that holds the board of this environment until its input ends."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


def hold_soon(board: Board, timeout_s: float = 5.0) -> None:
    """Hold and release, waiting for a lock that is about to go."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with board.hold("next"):
                return
        except BoardBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def blocked_probe(tmp_path: Path) -> dict[str, Any]:
    """A request that the probe cannot finish: a fact that never ends."""
    tree = tmp_path / "tree"
    (tree / "proc").mkdir(parents=True)
    os.mkfifo(tree / "proc" / "cpuinfo")
    return {"sysroot": str(tree), "architecture": "aarch64"}


def fill(folder: Path) -> None:
    """Leave no byte free on a disk."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


# Opening ---------------------------------------------------------------------------------------------------------------


def test_opening_the_local_board_writes_nothing(board: Board, root: Path) -> None:
    assert (board.name, board.root, board.python) == ("local", str(root), sys.executable)
    assert not root.exists()
    assert isinstance(board.transport, LocalTransport)


def test_the_local_board_lives_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EDGEPRUNE_ROOT", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with Board.open("local") as board:
        assert board.root == str(tmp_path / ".edgeprune")


def test_a_name_that_is_not_configured_is_refused_with_the_command_that_adds_it(root: Path) -> None:
    with pytest.raises(UnknownBoardError, match=r"one of local, found 'orin'. Try: edgeprune device add orin --ssh"):
        Board.open("orin")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://board", r"must read ssh://user@host:port .*found http://"),
        (
            "ssh://user@host?pyhton=/x",
            r"with the options python, root, identity, host_key, jump, cores, found the option pyhton",
        ),
        ("ssh://user@host?python=", r"found the option python"),
        ("ssh://user@host:99999", r"an ssh target must be"),
        ("ssh://user@host?host_key=MD5:12", r"host_key of a board's address breaks a rule"),
        (
            "ssh://user@host?cores=7-4",
            r"cores of a board's address breaks a rule .*as taskset takes them, 4-7 or 0,2-3",
        ),
    ],
)
def test_an_address_that_cannot_be_read_is_refused(root: Path, url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Board.open(url)


def test_a_password_in_an_address_is_refused_and_not_repeated(root: Path) -> None:
    with pytest.raises(ConfigError, match="must not hold a password") as caught:
        Board.open("ssh://user:s3cret@host")
    assert "s3cret" not in str(caught.value)


def test_a_board_that_is_open_is_shared_until_the_last_one_closes_it(root: Path) -> None:
    class Counting(LocalTransport):
        closed = 0

        def close(self) -> None:
            Counting.closed += 1

    outer = Board(Counting(), name="counted", python=sys.executable, root=str(root))
    with Board.open(outer) as inner:
        assert inner is outer
    assert Counting.closed == 0
    outer.close()
    assert Counting.closed == 1


@pytest.mark.parametrize("python", ["/nowhere/python3", "/bin/sh", "/bin/true"])
def test_a_board_without_python_is_told_what_to_do(root: Path, python: str) -> None:
    with pytest.raises(
        IncompatibleTargetError, match=rf"needs python >= 3\.6, the board has none at {python}.*--python"
    ) as caught:
        Board(LocalTransport(), name="bare", python=python, root=str(root))
    assert (caught.value.field, caught.value.needed) == ("python", ">= 3.6")


def old_python() -> str | None:
    """A Python 2 of this machine that starts, or None."""
    for path in [shutil.which("python2.7"), *sorted(Path.home().glob(".pyenv/versions/2.7.*/bin/python2.7"))]:
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return str(path)
    return None


@pytest.mark.skipif(old_python() is None, reason="no Python 2 on this machine")
def test_a_python_that_is_too_old_is_named_with_its_version(root: Path) -> None:
    python = old_python()
    assert python is not None
    with pytest.raises(IncompatibleTargetError, match=rf"the board has 2\.7\.\d+ at {python}"):
        Board(LocalTransport(), name="old", python=python, root=str(root))


# Verbs ------------------------------------------------------------------------------------------------------------------


def test_the_runner_is_uploaded_once_and_found_by_the_next_board(board: Board, root: Path) -> None:
    board.call("store", {"action": "missing", "blobs": {}})
    path = root / "runner" / runner_package().name
    assert path.read_bytes() == runner_package().content
    before = path.stat()
    with Board.open("local") as another:
        another.call("store", {"action": "missing", "blobs": {}})
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def test_a_runner_that_is_not_whole_is_uploaded_anew(root: Path) -> None:
    path = root / "runner" / runner_package().name
    path.parent.mkdir(parents=True)
    path.write_bytes(runner_package().content[:100])
    with Board.open("local") as board:
        assert board.call("store", {"action": "missing", "blobs": {}})["missing"] == []


def test_events_come_before_the_result(board: Board) -> None:
    events: list[dict[str, Any]] = []
    result = board.call("lock", {"purpose": "x", "user": "ana", "host": "h", "pid": 1}, on_event=events.append)
    assert [event["event"] for event in events] == ["held"]
    assert events[0]["holder"]["user"] == "ana"
    assert result == {"released": True}


def test_what_a_listener_raises_ends_the_verb(board: Board) -> None:
    def stop(event: dict[str, Any]) -> None:
        raise ConfigError("enough.")

    with pytest.raises(ConfigError, match="enough"):
        board.call("lock", {"purpose": "x"}, on_event=stop)
    hold_soon(board)


def test_past_the_deadline_the_verb_is_killed(board: Board, tmp_path: Path) -> None:
    with pytest.raises(RemoteTimeoutError, match=r"must finish within 1 s"):
        board.call("probe", blocked_probe(tmp_path), timeout_s=1.0)


def test_a_failure_on_the_board_is_the_exception_that_it_names(board: Board) -> None:
    with pytest.raises(TransferError, match=r"blob 0{64} must have been uploaded, found nothing"):
        board.call("store", {"action": "adopt", "blobs": ["0" * 64]})
    with pytest.raises(CommandError, match=r"named by its sha256 in lower-case hex, found '\.\./\.\./etc/passwd'"):
        board.call("store", {"action": "adopt", "blobs": ["../../etc/passwd"]})
    with pytest.raises(CommandError, match=r"the verb must be one of .*, found 'dance'"):
        board.call("dance", {})


def test_a_runner_that_breaks_is_told_by_its_last_line(board: Board) -> None:
    with pytest.raises(
        CommandError, match=r"verb 'probe' must give a result, but it ended with exit code 1: TypeError"
    ):
        board.call("probe", {"sysroot": 5})


def test_a_runner_that_is_killed_is_told_by_its_signal(board: Board, tmp_path: Path) -> None:
    request = blocked_probe(tmp_path)

    def kill_runner() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    argv = path.read_bytes().split(b"\0")
                except OSError:
                    continue
                if f"{board.root}/runner/{runner_package().name}".encode() in argv and b"probe" in argv:
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_runner)
    killer.start()
    with pytest.raises(CommandError, match=r"must give a result, but it was killed by SIGKILL\. Try: look for memory"):
        board.call("probe", request, timeout_s=20)
    killer.join()


@pytest.mark.parametrize(
    ("event", "kind", "words"),
    [
        ({"error": "BoardFullError", "message": "full.", "hint": "tidy up"}, BoardFullError, r"full\. Try: tidy up"),
        ({"error": "KeyError", "message": "boom."}, CommandError, r"KeyError: boom\."),
        ({"error": "SystemExit", "message": "boom."}, CommandError, "SystemExit: boom"),
        ({"error": "__doc__", "message": "boom."}, CommandError, "__doc__: boom"),
        (
            {"error": "BudgetInfeasibleError", "message": "no.", "details": {"best_ms": 2.5}},
            BudgetInfeasibleError,
            "no",
        ),
        (
            {
                "error": "IncompatibleTargetError",
                "message": "no.",
                "details": {"field": "a", "needed": "b", "found": "c"},
            },
            IncompatibleTargetError,
            "needs a b, the board has c",
        ),
        ({"error": "IncompatibleTargetError", "message": "no."}, IncompatibleTargetError, "the board has unknown"),
    ],
)
def test_only_errors_of_edgeprune_can_be_named_by_a_board(event: dict[str, Any], kind: type, words: str) -> None:
    error = error_of({"event": "error", **event})
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error


# The lock ---------------------------------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_holds_the_board_and_since_when(board: Board) -> None:
    holder = start_holder()
    try:
        with pytest.raises(BoardBusyError) as caught, board.hold("mine"):
            pytest.fail("the board was held twice")
        text = str(caught.value)
        assert f"on {socket.gethostname()} (process {holder.pid}, a test of locks) has held it since 20" in text
        assert " UTC" in text
    finally:
        holder.communicate(timeout=20)
    hold_soon(board)


def test_a_killed_holder_leaves_a_file_that_blocks_nobody(board: Board, root: Path) -> None:
    holder = start_holder()
    holder.kill()
    holder.wait(10)
    hold_soon(board)
    assert (root / "lock").exists()


def test_a_killed_lock_process_leaves_a_name_that_blocks_nobody(board: Board, root: Path) -> None:
    holder = start_holder()
    try:
        record = json.loads((root / "lock").read_text())
        assert record["purpose"] == "a test of locks"
        os.kill(record["board_pid"], signal.SIGKILL)
        hold_soon(board)
    finally:
        holder.communicate(timeout=20)


def test_a_garbled_lock_file_blocks_nobody(board: Board, root: Path) -> None:
    root.mkdir()
    (root / "lock").write_bytes(b"\xff{")
    hold_soon(board)


def test_the_lock_goes_with_an_exception_in_the_block(board: Board) -> None:
    with pytest.raises(ZeroDivisionError), board.hold("will fail"):
        raise ZeroDivisionError
    with Board.open("local") as another, another.hold("after"):
        pass


def test_holding_again_through_the_same_board_is_one_hold(board: Board) -> None:
    with Board.open("local") as another:
        with board.hold("outer"):
            with board.hold("inner"):
                pass
            with pytest.raises(BoardBusyError, match="outer"), another.hold("other"):
                pytest.fail("the inner hold released the outer one")
        with another.hold("other"):
            pass


def test_a_lock_that_was_lost_is_taken_again_by_the_next_call(
    board: Board, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Board.open("local") as another, board.hold("long work"):
        board.call("store", {"action": "missing", "blobs": {}})
        assert caplog.records == []
        os.kill(json.loads((root / "lock").read_text())["board_pid"], signal.SIGKILL)
        hold_soon(another)
        board.call("store", {"action": "missing", "blobs": {}})
        assert [record.message for record in caplog.records] == [
            "the lock of board local was lost on the way; it is taken again."
        ]
        with pytest.raises(BoardBusyError, match="long work"), another.hold("mine"):
            pytest.fail("the board was held twice")
    hold_soon(board)


def test_what_was_timed_after_the_lock_was_lost_is_not_taken(board: Board, root: Path) -> None:
    pytest.importorskip("onnxruntime")
    request = {"engines": {}, "rounds": [], "warmup_ms": 1.0}
    told = []

    def lose_the_lock(event: dict[str, Any]) -> None:
        told.append(event["event"])
        os.kill(json.loads((root / "lock").read_text())["board_pid"], signal.SIGKILL)
        time.sleep(0.2)

    with board.hold("timing"):
        with pytest.raises(ConnectError, match="must be held as long as it measures, its lock was lost on the way"):
            board.call("bench", request, on_event=lose_the_lock)
        assert told == ["ready"]
        assert board.call("bench", request)["overhead_ms"] > 0


def test_an_upload_that_another_host_had_adopted_is_there(board: Board, root: Path) -> None:
    sha256 = board.push(b"engine")
    assert board.call("store", {"action": "adopt", "blobs": [sha256]}) == {}
    (root / "store" / sha256).chmod(0o644)
    (root / "store" / sha256).write_bytes(b"damage")
    with pytest.raises(TransferError, match="must have been uploaded, found nothing"):
        board.call("store", {"action": "adopt", "blobs": [sha256]})


def test_a_lock_that_was_lost_to_somebody_else_stops_the_work(board: Board, root: Path) -> None:
    with board.hold("long work"):
        os.kill(json.loads((root / "lock").read_text())["board_pid"], signal.SIGKILL)
        time.sleep(0.2)
        holder = start_holder()
        try:
            with pytest.raises(BoardBusyError, match="a test of locks"):
                board.call("store", {"action": "missing", "blobs": {}})
        finally:
            holder.communicate(timeout=20)
    hold_soon(board)


def test_two_processes_that_race_never_hold_the_board_together(board: Board, root: Path, tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from edgeprune.boards.board import Board
from edgeprune.errors import BoardBusyError
held = 0
with Board.open("local") as board:
    deadline = time.monotonic() + 20
    while held < 5 and time.monotonic() < deadline:
        try:
            with board.hold("race"):
                os.close(os.open({str(tmp_path / "mine")!r}, os.O_CREAT | os.O_EXCL))
                time.sleep(0.02)
                os.remove({str(tmp_path / "mine")!r})
                held += 1
        except BoardBusyError:
            time.sleep(0.01)
sys.exit(0 if held == 5 else 9)
"""
    racers = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for racer in racers:
        _, stderr = racer.communicate(timeout=60)
        assert racer.returncode == 0, stderr.decode()


# The store --------------------------------------------------------------------------------------------------------------


def test_a_pushed_file_is_stored_under_its_hash_and_sent_once(board: Board, root: Path, tmp_path: Path) -> None:
    content = os.urandom(2_000_000)
    (tmp_path / "file").write_bytes(content)
    told: list[tuple[int, int]] = []
    sha256 = board.push(tmp_path / "file", progress=lambda done, total: told.append((done, total)))
    assert sha256 == hashlib.sha256(content).hexdigest()
    stored = root / "store" / sha256
    assert stored.read_bytes() == content
    assert told[0][0] < told[-1][0] == len(content)
    before = stored.stat()
    told.clear()
    assert board.push(content, progress=lambda done, total: told.append((done, total))) == sha256
    assert told == [(len(content), len(content))]
    assert stored.stat().st_ino == before.st_ino
    assert list((root / "incoming").iterdir()) == []


def test_a_blob_that_was_cut_short_is_sent_anew(board: Board, root: Path) -> None:
    sha256 = board.push(b"content")
    stored = root / "store" / sha256
    stored.chmod(0o644)
    stored.write_bytes(b"cont")
    assert board.push(b"content") == sha256
    assert stored.read_bytes() == b"content"


def test_an_upload_with_other_content_is_not_adopted(board: Board, root: Path) -> None:
    sha256 = hashlib.sha256(b"expected").hexdigest()
    (root / "incoming").mkdir(parents=True)
    (root / "incoming" / sha256).write_bytes(b"found")
    with pytest.raises(TransferError, match=rf"must have sha256 {sha256}, found [0-9a-f]{{64}}; it was removed"):
        board.call("store", {"action": "adopt", "blobs": [sha256]})
    assert list((root / "incoming").iterdir()) == []
    assert not (root / "store").exists()


def test_an_empty_file_can_be_pushed(board: Board, root: Path) -> None:
    assert (root / "store" / board.push(b"")).read_bytes() == b""


def test_a_full_board_is_told_before_a_byte_is_sent(small_disk: Path) -> None:
    board = Board(LocalTransport(), name="tiny", python=sys.executable, root=str(small_disk / "root"))
    board.push(b"small")
    with pytest.raises(
        BoardFullError, match=r"board tiny must have 5\.0 MB free under .* to take 4\.0 MB, found [0-2]\.\d MB"
    ):
        board.push(b"x" * 4_000_000)
    assert list((small_disk / "root" / "incoming").iterdir()) == []


def test_a_disk_that_fills_up_during_a_verb_is_told_as_full(small_disk: Path) -> None:
    root = small_disk / "root"
    board = Board(LocalTransport(), name="tiny", python=sys.executable, root=str(root))
    board.call("store", {"action": "missing", "blobs": {}})
    fill(small_disk)
    with (
        pytest.raises(BoardFullError, match=r"the board must have free space at .*root, found none left"),
        board.hold("x"),
    ):
        pytest.fail("a lock without a name was held")


def test_a_full_disk_does_not_keep_the_probe_from_answering(small_disk: Path) -> None:
    board = Board(LocalTransport(), name="tiny", python=sys.executable, root=str(small_disk / "root"))
    board.call("store", {"action": "missing", "blobs": {}})
    fill(small_disk)
    assert board.probe().free_disk_bytes == 0
    assert sorted(path.name for path in (small_disk / "root").iterdir()) == ["runner"]


def test_what_is_timed_keeps_to_the_cores_that_were_chosen(root: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    with Board(LocalTransport(), name="big", python=sys.executable, root=str(root), cores=mine[:1]) as board:
        found = board.probe()
        assert found.cores == 1
        assert found.facts["cores_bound"] == mine[:1]
        assert found.identity("onnxruntime")["bound_cores"] == mine[:1]
    with Board(LocalTransport(), name="all", python=sys.executable, root=str(root)) as board:
        assert board.probe().cores == len(mine)
        assert "bound_cores" not in board.probe().identity("onnxruntime")
    with (
        Board(LocalTransport(), name="none", python=sys.executable, root=str(root), cores=[mine[0], 9000]) as board,
        pytest.raises(CommandError, match=rf"must let its user have the cores {mine[0]}, 9000, found {mine[0]}"),
    ):
        board.probe()
