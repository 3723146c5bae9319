"""The SSH transport over links that are refused, cut or dead: it says so in time, and leaves nothing running."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from edgeprune.boards.ssh import SshTransport
from edgeprune.boards.ssh_route import end_process
from edgeprune.errors import CommandError, ConfigError, ConnectError, RemoteError, RemoteTimeoutError
from edgeprune.testing.transport import assert_gone

pytestmark = pytest.mark.loopback


def test_refused_port():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(ConnectError, match="the connection is refused") as caught:
            SshTransport(f"me@127.0.0.1:{port}").run(["true"])
    assert f"me@127.0.0.1:{port}" in str(caught.value)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_host_name_that_does_not_exist():
    with pytest.raises(ConnectError, match=r"host name no-such-board\.invalid cannot be resolved"):
        SshTransport("me@no-such-board.invalid", connect_timeout_s=5).run(["true"])


def test_server_that_accepts_and_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(ConnectError, match="no SSH handshake within 1 s"):
            SshTransport(f"me@127.0.0.1:{silent.getsockname()[1]}", connect_timeout_s=1).run(["true"])
        assert time.monotonic() - started < 3


def test_server_that_speaks_another_protocol():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            stream, _ = server.accept()
            with stream:
                stream.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 200)

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(ConnectError, match="SSH handshake failed") as caught:
            SshTransport(f"me@127.0.0.1:{server.getsockname()[1]}", connect_timeout_s=3).run(["true"])
    assert "\n" not in str(caught.value)


def test_black_holed_address(far_board, link):
    link.black_hole()
    started = time.monotonic()
    with pytest.raises(ConnectError, match="no SSH handshake within 3 s"):
        far_board.run(["true"])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.7, 0.8])
def test_link_that_dies_while_it_is_opened_or_used(far_board, link, share):
    far_board.run(["true"])
    far_board.close()
    link.black_hole(int(link.sent_bytes * share))
    started = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        far_board.run(["true"], timeout_s=2)
    assert time.monotonic() - started < 9
    assert "\n" not in str(caught.value)


def test_link_that_dies_under_a_command_ends_at_the_deadline(far_board, board, link):
    pids: list[int] = []

    def told(line: str) -> None:
        pids.append(int(line))
        link.black_hole()

    started = time.monotonic()
    with pytest.raises(RemoteTimeoutError, match="within 3 s"):
        far_board.run(["sh", "-c", "echo $$; sleep 60"], timeout_s=3, on_line=told)
    assert time.monotonic() - started < 6
    # The board knows nothing of the dead link; its own clock ends the command.
    assert_gone(board, pids[0], within_s=20)


def test_link_that_dies_while_much_is_sent_ends_at_the_deadline(far_board, link):
    far_board.run(["true"])
    link.black_hole(3_000_000)
    started = time.monotonic()
    with pytest.raises(RemoteError):
        far_board.run(["sh", "-c", "cat > /dev/null"], stdin=bytes(50_000_000), timeout_s=4)
    assert time.monotonic() - started < 7


@pytest.fixture
def impatient(monkeypatch):
    """Keepalive every second and 3 s of silence at most, instead of 5 s and 15 s."""
    monkeypatch.setattr("edgeprune.boards.ssh_connection.KEEPALIVE_S", 1)
    monkeypatch.setattr("edgeprune.boards.ssh_connection.SILENCE_LIMIT_S", 3)


def test_dead_link_is_noticed_before_a_distant_deadline(impatient, far_board, link):
    started = time.monotonic()
    with pytest.raises(ConnectError, match="no sign of life for 3 s"):
        far_board.run(["sh", "-c", "echo up; sleep 600"], timeout_s=600, on_line=lambda _: link.black_hole())
    assert time.monotonic() - started < 7


def test_dead_link_is_noticed_while_a_file_is_sent(impatient, far_board, link, tmp_path):
    (tmp_path / "file").write_bytes(bytes(40_000_000))
    far_board.run(["true"])
    link.black_hole(5_000_000)
    started = time.monotonic()
    with pytest.raises(ConnectError, match="no sign of life for 3 s"):
        far_board.put(tmp_path / "file", str(tmp_path / "copy"))
    assert time.monotonic() - started < 10


def test_dead_link_is_noticed_while_nothing_is_done(impatient, far_board, link):
    far_board.run(["true"])
    link.black_hole()
    time.sleep(5)
    link.mend()
    assert far_board.run(["echo", "new link"]).stdout == b"new link\n"


def test_quiet_command_on_a_good_link_is_left_alone(impatient, far_board):
    assert far_board.run(["sh", "-c", "sleep 7; echo done"], timeout_s=60).stdout == b"done\n"


def test_calls_give_their_descriptors_and_threads_back(board):
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    board.run(["true"])
    before = held()
    for _ in range(20):
        board.run(["true"])
        board.open_process(["cat"]).close()
    with pytest.raises(RemoteTimeoutError):
        board.run(["sleep", "60"], timeout_s=0.3)
    time.sleep(0.5)
    after = held()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2


def test_cut_link_ends_the_command_on_the_board(far_board, board, link):
    pids: list[int] = []

    def told(line: str) -> None:
        pids.append(int(line))
        if len(pids) == 2:
            link.cut()

    started = time.monotonic()
    with pytest.raises(ConnectError, match="must stay up, it was lost"):
        far_board.run(["sh", "-c", "echo $$; sleep 600 & echo $!; wait"], timeout_s=600, on_line=told)
    assert time.monotonic() - started < 10
    for pid in pids:
        assert_gone(board, pid)


def test_cut_link_ends_a_process_on_the_board(far_board, board, link):
    process = far_board.open_process(["sh", "-c", "echo $$; sleep 600"])
    pid = int(process.readline(10) or "")
    link.cut()
    with pytest.raises(ConnectError):
        process.readline(10)
    with pytest.raises(ConnectError):
        process.close()
    assert_gone(board, pid)


def test_server_that_is_killed_takes_the_commands_with_it(new_server, board):
    server = new_server()
    with SshTransport("board", config=server.config) as transport:
        process = transport.open_process(["sh", "-c", "echo $$; sleep 600"])
        pid = int(process.readline(10) or "")
        server.cut()
        with pytest.raises(ConnectError):
            process.readline(10)
        with pytest.raises(ConnectError, match="the connection is refused"):
            transport.run(["true"])
    assert_gone(board, pid)


def test_the_next_call_opens_a_new_link(far_board, link):
    assert far_board.run(["echo", "1"]).stdout == b"1\n"
    link.cut()
    assert far_board.run(["echo", "2"]).stdout == b"2\n"
    far_board.close()
    assert far_board.run(["echo", "3"]).stdout == b"3\n"


def test_killed_host_process_leaves_nothing_on_the_board(sshd, board, tmp_path):
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from edgeprune.boards.ssh import SshTransport
        transport = SshTransport("board", config=Path({str(sshd.config)!r}))
        transport.run(["sh", "-c", "echo $$; sleep 600"], timeout_s=600, on_line=lambda line: print(line, flush=True))
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    assert_gone(board, pid)


def test_ctrl_c_in_a_terminal_leaves_nothing_on_the_board(sshd, board):
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from edgeprune.boards.ssh import SshTransport
        with SshTransport("board", config=Path({str(sshd.config)!r})) as transport:
            transport.run(["sh", "-c", "echo $$; sleep 600"], timeout_s=600, on_line=lambda line: print(line, flush=True))
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert b"KeyboardInterrupt" in errors
    assert_gone(board, pid)


def test_ctrl_c_at_any_instant_leaves_nothing_on_the_board(sshd, board, tmp_path):
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from edgeprune.boards.ssh import SshTransport
        with SshTransport("board", config=Path({str(sshd.config)!r})) as transport:
            transport.run(["true"])
            print("go", flush=True)
            while True:
                transport.run(["sh", "-c", "echo $$ >> {tmp_path}/pids; exec sleep 0.05"])
        """
    )
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        time.sleep(random.uniform(0, 0.4))
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            # Python drops an interrupt that comes while it runs a finalizer; whoever pressed Ctrl-C does so again.
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=15)
    for line in (tmp_path / "pids").read_text().split():
        assert_gone(board, int(line))


def test_nothing_of_ours_runs_on_after_close(new_server):
    server = new_server(environment={"EDGEPRUNE_MARK": "of this test"})
    with SshTransport("board", config=server.config) as transport:
        # Often enough to meet a race between the end of a command and the board's clock for it.
        for _ in range(100):
            transport.run(["true"], timeout_s=300)
        transport.open_process(["cat"]).close()

    def ours() -> list[str]:
        marked = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if b"EDGEPRUNE_MARK=of this test" in path.read_bytes():
                    marked.append((path.parent / "cmdline").read_bytes().decode())
            except OSError:
                continue
        return marked

    deadline = time.monotonic() + 5
    while ours() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ours() == []


def test_exceptions_of_a_callback_that_look_like_link_failures_are_left_alone(board):
    with pytest.raises(EOFError, match="mine"):
        board.run(["echo", "line"], on_line=_raise_eof)
    assert board.run(["echo", "up"]).stdout == b"up\n"


def _raise_eof(line: str) -> None:
    raise EOFError("mine")


def test_start_up_files_that_print_do_not_reach_the_output(new_server, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("echo welcome; echo warning >&2; printf 'no newline'\n")
    if os.environ.get("SHELL") is None or not Path("/bin/bash").exists():
        pytest.skip("the account's shell is not known to be bash")
    server = new_server(environment={"HOME": str(home), "SHLVL": "0"})
    with SshTransport("board", config=server.config) as transport:
        result = transport.run(["sh", "-c", "echo out; echo err >&2"])
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")


def test_account_that_runs_no_commands_is_named(new_server):
    server = new_server(options=["ForceCommand echo no commands here; exit 1"])
    with pytest.raises(CommandError, match="must run commands with a POSIX shell, found: no commands here"):
        SshTransport("board", config=server.config).run(["true"])


def test_server_that_allows_one_session_only_is_named(new_server):
    server = new_server(options=["MaxSessions 1"])
    with pytest.raises(CommandError, match="must open one more session, it refuses") as caught:
        SshTransport("board", config=server.config).run(["true"])
    assert "MaxSessions" in str(caught.value)


@pytest.mark.parametrize("argv", [[], ["echo", "a\0b"], ["echo", "x" * 200_000]])
def test_what_cannot_be_a_command_line_is_refused(board, argv):
    with pytest.raises(ConfigError):
        board.run(argv)
    assert board.run(["echo", "up"]).stdout == b"up\n"


def test_errors_stay_off_standard_error(sshd, tmp_path):
    # paramiko logs tracebacks of its own thread; without a logging set-up Python would print them.
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from edgeprune.boards.ssh import SshTransport
        from edgeprune.errors import RemoteError
        for port in ({sshd.port}, 1):
            try:
                SshTransport(f"me@127.0.0.1:{{port}}", known_hosts=Path("/dev/null")).run(["true"])
            except RemoteError as error:
                print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == ""


def test_a_proxy_command_that_ignores_being_told_to_end_is_ended():
    stubborn = ["sh", "-c", 'trap "" TERM; echo ready; while :; do sleep 0.1; done']
    with subprocess.Popen(stubborn, stdout=subprocess.PIPE) as proxy:
        assert proxy.stdout is not None
        assert proxy.stdout.readline() == b"ready\n"
        started = time.monotonic()
        end_process(proxy)
        assert time.monotonic() - started < 5
        assert proxy.returncode == -signal.SIGKILL
