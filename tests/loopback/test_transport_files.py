"""Copying over SSH: resumed after a cut at any byte, whole or not at all, and clear about a full disk."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest

from edgeprune.boards.ssh import SshTransport
from edgeprune.boards.ssh_files import _MOVE, _TAKEN_AWAY
from edgeprune.errors import BoardFullError, ConnectError, RemoteError, TransferError
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import OpenSshServer

pytestmark = pytest.mark.loopback

SIZE = 4_000_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(random.Random(7).randbytes(SIZE))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder on the board; the board is this machine."""
    path = tmp_path / "on the board"
    path.mkdir()
    return path


@pytest.mark.parametrize("seed", range(6))
def test_put_goes_on_where_a_cut_stopped_it(far_board, link, source, folder, seed):
    cut_at = random.Random(seed).randrange(200_000, SIZE)
    far_board.run(["true"])
    link.cut_after(cut_at)
    with pytest.raises(ConnectError, match="goes on where it stopped") as caught:
        far_board.put(source, f"{folder}/file")
    assert "\n" not in str(caught.value)
    assert not (folder / "file").exists()
    (partial,) = folder.iterdir()
    # The server still writes what had reached it, so what is there may grow between two looks.
    content = partial.read_bytes()
    left = len(content)
    assert content == source.read_bytes()[:left]
    before = link.sent_bytes
    seen: list[int] = []
    far_board.put(source, f"{folder}/file", progress=lambda done, total: seen.append(done))
    assert (folder / "file").read_bytes() == source.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert seen[0] >= left
    # What was there is not sent again; handshake and framing are small.
    assert link.sent_bytes - before < SIZE - left + 200_000


def test_put_ends_after_any_number_of_cuts(far_board, link, source, folder):
    far_board.run(["true"])
    rest = random.Random(3)
    for _ in range(12):
        link.cut_after(rest.randrange(3_000, 1_200_000))
        try:
            far_board.put(source, f"{folder}/file")
            break
        except RemoteError:
            assert not (folder / "file").exists()
    # A copy that was through before its cut leaves that cut pending.
    link.mend()
    far_board.put(source, f"{folder}/file")
    assert (folder / "file").read_bytes() == source.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_damaged_partial_file_is_not_built_upon(board, source, folder):
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    partial = folder / f"file.partial-{digest[:16]}"
    for content in (b"x" * 100_000, b"x" * (SIZE + 5), b"", source.read_bytes()):
        partial.write_bytes(content)
        board.put(source, f"{folder}/file")
        assert (folder / "file").read_bytes() == source.read_bytes()
        assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("lead", [0, 200_000, 1_500_000, 3_900_000, 4_000_000])
def test_hosts_that_copy_the_same_content_to_the_same_place_at_once_both_succeed(sshd, source, folder, lead):
    started = threading.Event()
    failures: list[BaseException] = []

    def copy(*, first: bool) -> None:
        def progress(done: int, total: int) -> None:
            if done >= lead:
                started.set()

        try:
            with SshTransport("board", config=sshd.config) as board:
                board.run(["true"])
                if not first and lead:
                    started.wait(30)
                board.put(source, f"{folder}/new/file", progress=progress if first else None)
        except (RemoteError, OSError) as error:
            failures.append(error)

    hosts = [threading.Thread(target=copy, kwargs={"first": first}) for first in (True, False, False)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(60)
    assert failures == []
    assert (folder / "new" / "file").read_bytes() == source.read_bytes()
    assert [path.name for path in (folder / "new").iterdir()] == ["file"]


def test_a_copy_that_another_host_has_finished_meanwhile_is_done(board, source, folder):
    def finish(done: int, total: int) -> None:
        if done == total:
            for partial in folder.glob("file.partial-*"):
                partial.rename(folder / "file")

    board.put(source, f"{folder}/file", progress=finish)
    assert (folder / "file").read_bytes() == source.read_bytes()


def test_a_copy_whose_partial_file_was_removed_is_made_again(board, source, folder):
    removed: list[Path] = []

    def remove(done: int, total: int) -> None:
        for partial in folder.glob("file.partial-*"):
            if done == total and not removed:
                removed.append(partial)
                partial.unlink()

    board.put(source, f"{folder}/file", progress=remove)
    assert len(removed) == 1
    assert (folder / "file").read_bytes() == source.read_bytes()


def test_a_partial_file_of_another_content_is_left_alone(board, source, folder):
    (folder / "file.partial-0123456789abcdef").write_bytes(b"of somebody else")
    board.put(source, f"{folder}/file")
    assert sorted(path.name for path in folder.iterdir()) == ["file", "file.partial-0123456789abcdef"]


def test_a_file_that_is_damaged_on_the_way_is_refused(board, source, folder):
    (folder / "file").write_bytes(b"old")

    def damage(done: int, total: int) -> None:
        if done == total:
            (partial,) = folder.glob("file.partial-*")
            with partial.open("r+b") as file:
                file.write(b"damaged")

    with pytest.raises(TransferError, match="a copy with the hash"):
        board.put(source, f"{folder}/file", progress=damage)
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_bytes() == b"old"


def test_a_source_that_shrinks_meanwhile_is_refused(board, source, folder):
    def shrink(done: int, total: int) -> None:
        if done == 0:
            source.write_bytes(b"short")

    with pytest.raises(TransferError, match="shorter"):
        board.put(source, f"{folder}/file", progress=shrink)
    assert list(folder.iterdir()) == []


def test_an_exception_of_the_callback_keeps_what_was_sent(board, source, folder):
    def stop(done: int, total: int) -> None:
        if done > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        board.put(source, f"{folder}/file", progress=stop)
    assert not (folder / "file").exists()
    seen: list[int] = []
    board.put(source, f"{folder}/file", progress=lambda done, total: seen.append(done))
    assert seen[0] > 1_000_000
    assert (folder / "file").read_bytes() == source.read_bytes()


def test_a_reader_never_sees_a_part_of_a_file(board, source, folder):
    (folder / "file").write_bytes(b"old")
    stop = threading.Event()
    sizes: set[int] = set()

    def watch() -> None:
        while not stop.is_set():
            sizes.add((folder / "file").stat().st_size)

    thread = threading.Thread(target=watch)
    thread.start()
    board.put(source, f"{folder}/file")
    stop.set()
    thread.join()
    assert sizes <= {3, SIZE}


def test_paths_start_at_home(board, source, tmp_path):
    home = board.run(["pwd"]).stdout.decode().strip()
    place = os.path.relpath(tmp_path, home)
    board.put(source, f"{place}/one")
    board.put(source, f"~/{place}/two")
    board.get(f"~/{place}/two", tmp_path / "back")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "back").read_bytes() == source.read_bytes()


def test_two_copies_at_once(board, source, folder):
    errors: list[BaseException] = []

    def copy(name: str) -> None:
        try:
            board.put(source, f"{folder}/{name}")
        except RemoteError as error:
            errors.append(error)

    threads = [threading.Thread(target=copy, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert all((folder / name).read_bytes() == source.read_bytes() for name in "abc")


def test_get_over_a_link_that_is_cut_leaves_no_file(far_board, link, source, tmp_path):
    source.write_bytes(os.urandom(30_000_000))
    far_board.run(["true"])
    place = tmp_path / "here"
    place.mkdir()
    link.cut_after(3_000)
    with pytest.raises(RemoteError):
        far_board.get(str(source), place / "file")
    assert list(place.iterdir()) == []
    far_board.get(str(source), place / "file")
    assert (place / "file").read_bytes() == source.read_bytes()


def test_get_of_a_folder(board, folder, tmp_path):
    with pytest.raises(TransferError, match="must be a file that can be read"):
        board.get(str(folder), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.fixture
def no_sftp(new_server) -> OpenSshServer:
    """A server as small boards have them."""
    return new_server(sftp="/nowhere/sftp-server")


def test_board_without_sftp_gets_its_files_through_its_shell(no_sftp, source, folder, tmp_path):
    with SshTransport("board", config=no_sftp.config) as transport:
        transport.put(source, f"{folder}/deep/-n/two words")
        assert (folder / "deep" / "-n" / "two words").read_bytes() == source.read_bytes()
        transport.get(f"{folder}/deep/-n/two words", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == source.read_bytes()
        transport.get("/proc/version", tmp_path / "version")
        assert (tmp_path / "version").read_text() == Path("/proc/version").read_text()
        (tmp_path / "empty").write_bytes(b"")
        transport.put(tmp_path / "empty", f"{folder}/deep/-n/two words")
        assert (folder / "deep" / "-n" / "two words").read_bytes() == b""
        assert [path.name for path in (folder / "deep" / "-n").iterdir()] == ["two words"]
        with pytest.raises(TransferError, match="deep is a folder"):
            transport.put(source, f"{folder}/deep")
        with pytest.raises(TransferError, match="No such file"):
            transport.get(f"{folder}/nothing-here", tmp_path / "back")


def test_board_without_sftp_goes_on_where_a_cut_stopped_a_copy(no_sftp, source, folder, tmp_path):
    known = tmp_path / "known_hosts"
    with FaultyLink(no_sftp.host, no_sftp.port) as link:
        known.write_text("".join(f"[{link.host}]:{link.port} {key}\n" for key in no_sftp.public_keys()))
        target = f"{no_sftp.user}@{link.host}:{link.port}"
        with SshTransport(target, identity=no_sftp.identity, known_hosts=known, connect_timeout_s=3) as transport:
            transport.run(["true"])
            link.cut_after(2_500_000)
            with pytest.raises(ConnectError, match=r"goes on where it stopped"):
                transport.put(source, f"{folder}/file")
            (partial,) = folder.iterdir()
            assert partial.read_bytes() == source.read_bytes()[: partial.stat().st_size]
            seen: list[int] = []
            transport.put(source, f"{folder}/file", progress=lambda done, total: seen.append(done))
            assert seen[0] > 1_500_000
    assert (folder / "file").read_bytes() == source.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_copy_that_another_host_ends_on_a_board_without_sftp(no_sftp, source, folder):
    with SshTransport("board", config=no_sftp.config) as first, SshTransport("board", config=no_sftp.config) as second:

        def ended(done: int, total: int) -> None:
            if done == total:
                second.put(source, f"{folder}/file")

        first.put(source, f"{folder}/file", progress=ended)
        assert (folder / "file").read_bytes() == source.read_bytes()
        # What is left of the race: between the look at the whole and its renaming.
        moved = first.run(["sh", "-c", _MOVE, "sh", f"{folder}/file.partial", f"{folder}/file"])
        assert moved.returncode == _TAKEN_AWAY
        moved = first.run(["sh", "-c", _MOVE, "sh", f"{folder}/file", "/proc/version"])
        assert moved.returncode not in (0, _TAKEN_AWAY)
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_disk_that_fills_up_on_a_board_without_sftp(no_sftp, source, small_disk):
    source.write_bytes(os.urandom(1_500_000))

    def fill(done: int, total: int) -> None:
        if done == 0:
            (small_disk / "hog").write_bytes(bytes(1_200_000))

    with SshTransport("board", config=no_sftp.config) as transport, pytest.raises(BoardFullError):
        transport.put(source, f"{small_disk}/file", progress=fill)
    assert [path.name for path in small_disk.iterdir()] == ["hog"]


def test_get_of_a_file_that_says_it_is_empty(board, tmp_path):
    board.get("/proc/version", tmp_path / "version")
    assert (tmp_path / "version").read_text() == Path("/proc/version").read_text()


def test_get_of_a_file_that_shrinks_or_grows_meanwhile_does_not_hang(board, source, tmp_path):
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for size in (SIZE, 1000, 2 * SIZE):
                os.truncate(source, size)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(5):
            board.get(str(source), tmp_path / "copy")
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MiB on the board."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    place = tmp_path / "small disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_file_that_does_not_fit_is_refused_before_it_is_sent(board, source, small_disk):
    seen: list[int] = []
    with pytest.raises(BoardFullError, match=f"must have {SIZE} bytes free, found 2097152") as caught:
        board.put(source, f"{small_disk}/file", progress=lambda done, total: seen.append(done))
    assert "\n" not in str(caught.value)
    assert seen == []
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(board, source, small_disk):
    source.write_bytes(os.urandom(1_500_000))
    (small_disk / "file").write_bytes(b"old")

    def fill(done: int, total: int) -> None:
        if done == 0:
            (small_disk / "hog").write_bytes(bytes(1_200_000))

    with pytest.raises(BoardFullError):
        board.put(source, f"{small_disk}/file", progress=fill)
    assert sorted(path.name for path in small_disk.iterdir()) == ["file", "hog"]
    assert (small_disk / "file").read_bytes() == b"old"
    (small_disk / "hog").unlink()
    board.put(source, f"{small_disk}/file")
    assert (small_disk / "file").read_bytes() == source.read_bytes()
