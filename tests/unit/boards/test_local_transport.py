"""This machine as a board: real processes, real files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.boards.local import LocalTransport
from edgeprune.errors import BoardFullError, CommandError, RemoteTimeoutError, TransferError
from edgeprune.testing.transport import TransportConformance

PARENT_AND_CHILD = "sleep 300 & echo $! $$; wait"


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def transport() -> LocalTransport:
    return LocalTransport()


class TestConformance(TransportConformance):
    """What every transport must do; the fixture above is the transport."""


def test_arguments_input_and_both_outputs_pass_unchanged(transport: LocalTransport) -> None:
    odd = ["a b", "", "'\"$HOME`id`\\", "ä\n;&|*?", "-x"]
    code = "import sys; sys.stdout.write(repr(sys.argv[1:])); sys.stderr.write(sys.stdin.read()); sys.exit(3)"
    ended = transport.run([sys.executable, "-c", code, *odd], stdin=b"to stderr")
    assert (ended.returncode, ended.stdout.decode(), ended.stderr) == (3, repr(odd), b"to stderr")


def test_much_input_and_output_at_once_does_not_stall(transport: LocalTransport) -> None:
    content = os.urandom(3_000_000)
    assert transport.run(["cat"], stdin=content, timeout_s=20).stdout == content


def test_a_command_that_ignores_its_input_ends_well(transport: LocalTransport) -> None:
    assert transport.run(["true"], stdin=b"x" * 1_000_000).returncode == 0


def test_lines_come_while_the_command_runs(transport: LocalTransport) -> None:
    times: list[tuple[str, float]] = []
    start = time.monotonic()
    transport.run(
        ["sh", "-c", "echo one; sleep 0.6; echo two; printf last"],
        on_line=lambda line: times.append((line, time.monotonic() - start)),
    )
    assert [line for line, _ in times] == ["one", "two", "last"]
    assert times[0][1] < 0.5 < times[1][1]


def test_a_signal_is_told_as_a_negative_code(transport: LocalTransport) -> None:
    assert transport.run(["sh", "-c", "kill -9 $$"]).returncode == -signal.SIGKILL


def test_a_missing_or_plain_file_gives_what_a_shell_would(transport: LocalTransport, tmp_path: Path) -> None:
    assert transport.run(["/nowhere/python3", "-c", "1"]).returncode == 127
    plain = tmp_path / "plain"
    plain.write_text("no program")
    ended = transport.run([str(plain)])
    assert ended.returncode == 126
    assert b"Permission denied" in ended.stderr
    with pytest.raises(CommandError, match="/nowhere/python3 must be a program of this machine"):
        transport.open_process(["/nowhere/python3"])


def test_past_the_deadline_the_command_and_its_children_are_killed(transport: LocalTransport) -> None:
    pids: list[int] = []
    start = time.monotonic()
    with pytest.raises(
        RemoteTimeoutError, match=r"sh must finish within 0\.5 s on this machine, found it still running"
    ):
        transport.run(
            ["sh", "-c", PARENT_AND_CHILD], timeout_s=0.5, on_line=lambda line: pids.extend(map(int, line.split()))
        )
    assert time.monotonic() - start < 3
    assert len(pids) == 2
    assert eventually(lambda: not any(map(alive, pids)))


def test_what_a_listener_raises_kills_the_command_and_comes_out(transport: LocalTransport) -> None:
    pids: list[int] = []

    def stop(line: str) -> None:
        pids.extend(map(int, line.split()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transport.run(["sh", "-c", PARENT_AND_CHILD], on_line=stop)
    assert eventually(lambda: not any(map(alive, pids)))


def test_ctrl_c_kills_the_command_and_its_children(tmp_path: Path) -> None:
    code = (
        "from edgeprune.boards.local import LocalTransport\n"
        f"LocalTransport().run(['sh', '-c', {PARENT_AND_CHILD!r}], on_line=lambda line: print(line, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as host:
        assert host.stdout is not None
        pids = [int(word) for word in host.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        host.send_signal(signal.SIGINT)
        assert host.wait(10) != 0
    assert eventually(lambda: not any(map(alive, pids)))


def test_a_command_is_done_although_something_it_left_behind_holds_its_output(transport: LocalTransport) -> None:
    start = time.monotonic()
    ended = transport.run(["sh", "-c", "sleep 30 & echo $!"], timeout_s=20)
    assert time.monotonic() - start < 5
    os.kill(int(ended.stdout), signal.SIGKILL)


def test_a_held_process_answers_and_ends_with_its_input(transport: LocalTransport) -> None:
    process = transport.open_process(["sh", "-c", "read a; echo got $a; cat; echo end; echo err >&2"], stdin=b"this\n")
    assert process.readline(5) == "got this"
    with pytest.raises(RemoteTimeoutError, match=r"within 0\.1 s"):
        process.readline(0.1)
    ended = process.close()
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"end\n", b"err\n")
    assert process.close() == ended


def test_a_held_process_whose_output_ended_says_none(transport: LocalTransport) -> None:
    process = transport.open_process(["sh", "-c", "printf partial"])
    assert process.readline(5) == "partial"
    assert process.readline(5) is None
    assert process.close().returncode == 0


def test_a_held_process_that_does_not_go_is_killed_with_its_children(
    transport: LocalTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.boards.local._CLOSE_S", 0.3)
    process = transport.open_process(["sh", "-c", PARENT_AND_CHILD])
    line = process.readline(5)
    assert line is not None
    assert process.close().returncode == -signal.SIGKILL
    assert eventually(lambda: not any(alive(int(pid)) for pid in line.split()))


def test_a_held_process_goes_when_its_host_is_killed(tmp_path: Path) -> None:
    code = (
        "import time\nfrom edgeprune.boards.local import LocalTransport\n"
        "process = LocalTransport().open_process(['sh', '-c', 'echo $$; cat >/dev/null'])\n"
        "print(process.readline(5), flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        assert alive(pid)
        host.kill()
    assert eventually(lambda: not alive(pid))


def test_a_put_file_is_whole_in_folders_that_are_made(transport: LocalTransport, tmp_path: Path) -> None:
    source = tmp_path / "source"
    content = os.urandom(2_500_000)
    source.write_bytes(content)
    target = tmp_path / "new folder" / "deep" / "file"
    told: list[tuple[int, int]] = []
    transport.put(source, str(target), progress=lambda done, total: told.append((done, total)))
    assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["file"]
    assert told[-1] == (len(content), len(content))
    back = tmp_path / "back"
    transport.get(str(target), back)
    assert back.read_bytes() == content


def test_a_relative_path_is_one_of_the_home_folder(
    transport: LocalTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "source").write_bytes(b"content")
    transport.put(tmp_path / "source", "folder/file")
    assert (tmp_path / "folder" / "file").read_bytes() == b"content"


@pytest.mark.parametrize("left", [b"", b"\0" * 1_500_000, b"other", None])
def test_a_put_goes_on_from_what_a_killed_one_left_or_starts_anew(
    transport: LocalTransport, tmp_path: Path, left: bytes | None
) -> None:
    content = b"\0" * 1_500_000 + os.urandom(1_500_000)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    target.write_bytes(b"before")
    tmp_path.joinpath("target.partial").write_bytes(content + b"too long" if left is None else left)
    transport.put(source, str(target))
    assert target.read_bytes() == content
    assert not tmp_path.joinpath("target.partial").exists()


def test_an_interrupted_put_leaves_the_target_as_it_was_and_nothing_beside(
    transport: LocalTransport, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(os.urandom(3_000_000))
    target.parent.mkdir()
    target.write_bytes(b"before")

    def interrupt(done: int, total: int) -> None:
        if done > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transport.put(source, str(target), progress=interrupt)
    assert target.read_bytes() == b"before"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_two_puts_of_one_target_at_once_do_not_mix(transport: LocalTransport, tmp_path: Path) -> None:
    contents = [bytes([index]) * 4_000_000 for index in range(4)]
    errors: list[BaseException] = []

    def put(index: int) -> None:
        try:
            for _ in range(5):
                transport.put(tmp_path / f"source{index}", str(tmp_path / "target"))
        except (TransferError, OSError) as error:
            errors.append(error)

    for index, content in enumerate(contents):
        (tmp_path / f"source{index}").write_bytes(content)
    threads = [threading.Thread(target=put, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert (tmp_path / "target").read_bytes() in contents
    assert not (tmp_path / "target.partial").exists()


def test_a_full_disk_leaves_the_target_as_it_was_and_nothing_beside(
    transport: LocalTransport, tmp_path: Path, small_disk: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(4_000_000))
    target = small_disk / "target"
    target.write_bytes(b"before")
    with pytest.raises(BoardFullError, match=r"must have room for 4000000 bytes, found the disk full"):
        transport.put(source, str(target))
    assert target.read_bytes() == b"before"
    assert [path.name for path in small_disk.iterdir()] == ["target"]


def test_a_missing_file_cannot_be_fetched_and_leaves_nothing(transport: LocalTransport, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(TransferError, match=r"/nowhere/file must be copied to .*found: No such file"):
        transport.get("/nowhere/file", folder / "file")
    assert list(folder.iterdir()) == []


def test_a_target_that_cannot_be_made_is_a_transfer_error(transport: LocalTransport, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"content")
    with pytest.raises(TransferError, match=r"must be copied to .*found: (File exists|Not a directory)"):
        transport.put(tmp_path / "source", str(tmp_path / "source" / "below" / "file"))


def test_a_home_folder_that_is_missing_is_named_and_not_the_program(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    with pytest.raises(CommandError, match=r"the home folder .*gone must exist for commands to start there"):
        LocalTransport().run(["true"])
