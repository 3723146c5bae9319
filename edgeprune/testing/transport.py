"""What every `Transport` must do, as tests. A subclass gives the fixture ``transport`` and is collected by pytest.

::

    class TestMyTransport(TransportConformance):
        @pytest.fixture
        def transport(self):
            with MyTransport(...) as transport:
                yield transport

The board needs a POSIX shell and the usual small programs; everything is checked through the transport itself.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune.boards.transport import Transport
from edgeprune.errors import RemoteTimeoutError, TransferError

AWKWARD = (
    "",
    " ",
    "two words",
    "it's",
    'say "hi"',
    "$(touch /tmp/edgeprune-was-here)",
    "`id`",
    "$HOME",
    "a\nb",
    "\n",
    "tab\there",
    "back\\slash\\n",
    "*",
    "~",
    "-n",
    "--",
    ";",
    "&& false",
    "| cat",
    "> out",
    "!event",
    "#comment",
    "%s",
    "{a,b}",
    "größer ✓ 板",
    "\x01\x1b[31m",
)
"""Arguments that a shell on the way would change."""

_arguments = st.lists(
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20), max_size=5
)

# Prints each argument between a mark and NUL, so that none can hide.
_SHOW = ["sh", "-c", 'for argument; do printf "<%s\\0" "$argument"; done', "show"]


class _StopHereError(Exception):
    """Raised by a test's own callback."""


class TransportConformance:
    """The suite. Tests of one class share nothing but what ``transport`` shares."""

    @pytest.fixture
    def folder(self, transport: Transport) -> Iterator[str]:
        """An empty folder on the board."""
        made = transport.run(["mktemp", "-d"])
        assert made.returncode == 0, made.stderr
        path = made.stdout.decode().strip()
        yield path
        transport.run(["rm", "-rf", "--", path])

    def test_has_an_address_on_one_line(self, transport: Transport) -> None:
        assert transport.address.strip() == transport.address
        assert transport.address
        assert "\n" not in transport.address

    # Arguments and streams

    def test_arguments_arrive_unchanged(self, transport: Transport) -> None:
        result = transport.run([*_SHOW, *AWKWARD])
        assert result.stdout.decode().split("\0") == [*(f"<{text}" for text in AWKWARD), ""]
        assert result.returncode == 0

    def test_any_arguments_arrive_unchanged(self, transport: Transport) -> None:
        @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(_arguments)
        def arrives(arguments: list[str]) -> None:
            result = transport.run([*_SHOW, *arguments])
            assert result.stdout.decode().split("\0") == [*(f"<{text}" for text in arguments), ""]

        arrives()

    def test_input_and_output_are_bytes(self, transport: Transport) -> None:
        content = bytes(range(256)) * 4096 + b"no newline at the end"
        result = transport.run(["cat"], stdin=content)
        assert result.stdout == content

    def test_input_ends_where_none_is_given(self, transport: Transport) -> None:
        result = transport.run(["cat"], timeout_s=10)
        assert (result.returncode, result.stdout) == (0, b"")

    def test_input_that_is_not_read_does_no_harm(self, transport: Transport) -> None:
        result = transport.run(["sh", "-c", "echo done; exit 3"], stdin=bytes(5_000_000), timeout_s=30)
        assert (result.returncode, result.stdout) == (3, b"done\n")

    def test_errors_have_a_stream_of_their_own(self, transport: Transport) -> None:
        result = transport.run(["sh", "-c", "echo out; echo err >&2"])
        assert (result.stdout, result.stderr) == (b"out\n", b"err\n")

    def test_much_output_on_both_streams_does_not_block(self, transport: Transport) -> None:
        script = "head -c 3000000 /dev/zero >&2 & head -c 3000000 /dev/zero; wait"
        result = transport.run(["sh", "-c", script], timeout_s=60)
        assert (len(result.stdout), len(result.stderr)) == (3_000_000, 3_000_000)

    # How a command ends

    @pytest.mark.parametrize("code", [0, 1, 2, 126, 127, 130, 143, 255])
    def test_exit_codes_arrive(self, transport: Transport, code: int) -> None:
        assert transport.run(["sh", "-c", f"exit {code}"]).returncode == code

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
    def test_a_signal_is_a_negative_return_code(self, transport: Transport, number: signal.Signals) -> None:
        assert transport.run(["sh", "-c", f"kill -{number.value} $$"]).returncode == -number

    def test_a_missing_program_is_a_result(self, transport: Transport) -> None:
        result = transport.run(["/nowhere/edgeprune-no-such-program"])
        assert result.returncode == 127
        assert b"edgeprune-no-such-program" in result.stderr

    def test_a_child_left_behind_does_not_hold_the_result_back(self, transport: Transport) -> None:
        started = time.monotonic()
        result = transport.run(["sh", "-c", "sleep 20 & echo $!"], timeout_s=15)
        assert time.monotonic() - started < 10
        assert result.returncode == 0
        transport.run(["kill", result.stdout.decode().strip()])

    # Lines

    def test_lines_arrive_before_the_command_ends(self, transport: Transport) -> None:
        arrivals: list[tuple[str, float]] = []
        transport.run(
            ["sh", "-c", "echo one; sleep 1; echo two"], on_line=lambda line: arrivals.append((line, time.monotonic()))
        )
        assert [line for line, _ in arrivals] == ["one", "two"]
        assert arrivals[1][1] - arrivals[0][1] > 0.5

    def test_lines_are_whole(self, transport: Transport) -> None:
        lines: list[str] = []
        script = "printf 'a\\n\\nb'; sleep 0.3; printf 'c\\303'; sleep 0.3; printf '\\251\\nlast'"
        result = transport.run(["sh", "-c", script], on_line=lines.append)
        assert lines == ["a", "", "bcé", "last"]
        assert result.stdout == "a\n\nbcé\nlast".encode()

    def test_an_exception_of_the_callback_ends_the_command(self, transport: Transport) -> None:
        seen: list[str] = []

        def stop(line: str) -> None:
            seen.append(line)
            raise _StopHereError

        with pytest.raises(_StopHereError):
            transport.run(["sh", "-c", "echo $$; sleep 60"], on_line=stop)
        assert_gone(transport, int(seen[0]))

    # Deadlines

    def test_a_command_past_its_deadline_is_killed_with_its_children(self, transport: Transport) -> None:
        lines: list[str] = []
        started = time.monotonic()
        with pytest.raises(RemoteTimeoutError) as caught:
            transport.run(["sh", "-c", "echo $$; sleep 60 & echo $!; wait"], timeout_s=2, on_line=lines.append)
        assert 1.5 < time.monotonic() - started < 6
        assert "2 s" in str(caught.value)
        assert "\n" not in str(caught.value)
        for line in lines:
            assert_gone(transport, int(line))

    def test_a_command_that_ignores_signals_is_killed_too(self, transport: Transport) -> None:
        lines: list[str] = []
        with pytest.raises(RemoteTimeoutError):
            transport.run(
                ["sh", "-c", "trap '' TERM HUP INT; echo $$; sleep 60; sleep 60"], timeout_s=1, on_line=lines.append
            )
        assert_gone(transport, int(lines[0]))

    def test_the_transport_works_on_after_a_deadline(self, transport: Transport) -> None:
        with pytest.raises(RemoteTimeoutError):
            transport.run(["sleep", "60"], timeout_s=0.5)
        assert transport.run(["echo", "here"]).stdout == b"here\n"

    @pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
    def test_ctrl_c_ends_the_command(self, transport: Transport) -> None:
        lines: list[str] = []

        def told(line: str) -> None:
            lines.append(line)
            timer.start()

        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            transport.run(["sh", "-c", "echo $$; sleep 60"], on_line=told)
        assert_gone(transport, int(lines[0]))

    # Processes

    def test_a_process_lives_while_its_input_is_open(self, transport: Transport) -> None:
        process = transport.open_process(
            ["sh", "-c", 'read -r word; echo "$word"; echo $$; cat; echo bye'], stdin=b"hello\n"
        )
        assert process.readline(10) == "hello"
        pid = int(process.readline(10) or "")
        assert transport.run(["kill", "-0", str(pid)]).returncode == 0
        result = process.close()
        assert (result.returncode, result.stdout) == (0, b"bye\n")
        assert process.close() == result
        assert_gone(transport, pid)

    def test_a_silent_process_does_not_block_its_reader(self, transport: Transport) -> None:
        process = transport.open_process(["sh", "-c", "echo $$; cat"])
        pid = int(process.readline(10) or "")
        with pytest.raises(RemoteTimeoutError):
            process.readline(0.3)
        process.close()
        assert_gone(transport, pid)

    def test_a_process_that_ignores_the_end_of_its_input_is_killed(self, transport: Transport) -> None:
        process = transport.open_process(["sh", "-c", "echo $$; sleep 60; sleep 60"])
        pid = int(process.readline(10) or "")
        assert process.close().returncode == -signal.SIGKILL
        assert_gone(transport, pid)

    def test_the_end_of_a_process_shows(self, transport: Transport) -> None:
        process = transport.open_process(["sh", "-c", "echo one; echo oops >&2; exit 4"])
        assert process.readline(10) == "one"
        assert process.readline(10) is None
        result = process.close()
        assert (result.returncode, result.stderr) == (4, b"oops\n")

    def test_commands_run_beside_a_process_and_each_other(self, transport: Transport) -> None:
        process = transport.open_process(["sh", "-c", "echo ready; cat"])
        assert process.readline(10) == "ready"
        outputs: dict[int, bytes] = {}

        def work(number: int) -> None:
            outputs[number] = transport.run(["sh", "-c", f"sleep 0.2; echo {number}"]).stdout

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        process.close()
        assert outputs == {number: f"{number}\n".encode() for number in range(4)}

    # Files

    @pytest.mark.parametrize("size", [0, 1, 32768, 3_000_017])
    def test_a_file_comes_back_as_it_went(self, transport: Transport, folder: str, tmp_path: Path, size: int) -> None:
        content = random.Random(size).randbytes(size)
        (tmp_path / "there").write_bytes(content)
        transport.put(tmp_path / "there", f"{folder}/deep/er/file")
        transport.get(f"{folder}/deep/er/file", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
        assert names(transport, f"{folder}/deep/er") == ["file"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]

    @pytest.mark.parametrize("name", ["two words", "it's", "$(id)", "größer", "-n", "new\nline", "*"])
    def test_file_names_are_taken_as_they_are(
        self, transport: Transport, folder: str, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "there").write_bytes(b"content")
        transport.put(tmp_path / "there", f"{folder}/{name}")
        transport.get(f"{folder}/{name}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"content"

    def test_put_replaces_a_file(self, transport: Transport, folder: str, tmp_path: Path) -> None:
        for content in (b"a longer old content", b"new"):
            (tmp_path / "there").write_bytes(content)
            transport.put(tmp_path / "there", f"{folder}/file")
        assert transport.run(["cat", f"{folder}/file"]).stdout == b"new"
        assert names(transport, folder) == ["file"]

    def test_progress_rises_to_the_whole(self, transport: Transport, folder: str, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        (tmp_path / "there").write_bytes(bytes(2_000_000))
        transport.put(tmp_path / "there", f"{folder}/file", progress=lambda done, total: seen.append((done, total)))
        assert seen == sorted(seen)
        assert seen[-1] == (2_000_000, 2_000_000)

    def test_put_refuses_a_place_that_cannot_be_written(
        self, transport: Transport, folder: str, tmp_path: Path
    ) -> None:
        (tmp_path / "there").write_bytes(b"content")
        transport.run(["mkdir", f"{folder}/taken"])
        with pytest.raises(TransferError) as caught:
            transport.put(tmp_path / "there", f"{folder}/taken")
        assert "\n" not in str(caught.value)
        assert names(transport, folder) == ["taken"]

    def test_put_of_a_file_that_is_not_there(self, transport: Transport, folder: str, tmp_path: Path) -> None:
        with pytest.raises(TransferError, match="nothing-here"):
            transport.put(tmp_path / "nothing-here", f"{folder}/file")
        assert names(transport, folder) == []

    def test_get_of_a_file_that_is_not_there(self, transport: Transport, folder: str, tmp_path: Path) -> None:
        (tmp_path / "back").write_bytes(b"old")
        with pytest.raises(TransferError, match="nothing-here"):
            transport.get(f"{folder}/nothing-here", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["back"]

    # Closing

    def test_close_twice(self, transport: Transport) -> None:
        transport.run(["true"])
        transport.close()
        transport.close()


def names(transport: Transport, folder: str) -> list[str]:
    """What is in a folder of the board."""
    listed = transport.run(["ls", "-A", "--", folder])
    assert listed.returncode == 0, listed.stderr
    return listed.stdout.decode().splitlines()


def assert_gone(transport: Transport, pid: int, within_s: float = 5.0) -> None:
    """Fail if a process of the board is still there after a while (a zombie counts as gone)."""
    deadline = time.monotonic() + within_s
    while (state := _state(transport, pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not state, f"process {pid} is still there: {state}"


def _state(transport: Transport, pid: int) -> str:
    # BusyBox's ps knows none of these options; where there is a /proc it tells.
    script = 'if [ -d /proc/self ]; then cat "/proc/$1/stat" 2> /dev/null; else ps -o stat=,args= -p "$1"; fi'
    shown = transport.run(["sh", "-c", script, "sh", str(pid)]).stdout.decode("utf-8", "replace").strip()
    # The name may hold anything, spaces and parentheses too; the state is what comes after it.
    return "" if shown.rpartition(")")[2].strip().startswith("Z") else shown
