"""Running commands over an SSH link so that none outlives its deadline, its caller or the link.

Closing an SSH channel does not end the command at its other end. So each link gets one more session with a small POSIX sh
loop, the guard: it is told the process group of every command, and kills those that still run when it is asked to, when
their time is over (the link may be dead without the board noticing), or when the link ends.

Source: session.c of OpenSSH 9.2: a command without a terminal leads a session and a process group of its own, exit status
comes before the rest of the output, and a lost link closes the pipes of a command without a signal.
"""

from __future__ import annotations

import math
import secrets
import selectors
import shlex
import signal
import threading
import time
from collections.abc import Callable, Sequence

from edgeprune.boards.ssh_connection import Connection
from edgeprune.boards.transport import CommandResult
from edgeprune.errors import CommandError, ConfigError, ConnectError, RemoteError, RemoteTimeoutError

# Login shells differ. What is quoted here holds in those of the POSIX sh family (sh, dash, bash, ash, ksh, zsh), and in fish
# but for backslashes within single quotes; csh is not supported.

# Become the leader of a process group, where the server did not see to that; what follows is the arguments of sh -c. No group
# is 0: that says qemu-user, which makes this file up, and to which setsid must not be left: as a leader it goes on as another.
_LEAD = (
    "{ read -r a b c d g e < /proc/$$/stat; } 2> /dev/null; "
    'case ${g:-0} in 0|$$) ;; *) exec setsid sh -c "$@";; esac; exec sh -c "$@"'
)
# The tag comes first on both streams, so that what the account's start-up files print can be told from the output.
# Nothing starts before the word go: a link that is lost until then leaves nothing behind.
_COMMAND = 't=$1; shift; echo "$t"; echo "$t $$" >&2; read -r go && [ "$go" = go ] && exec "$@"; exit 125'
# A clock is a session of its own, so that it is killed with its sleep; a trap in it would lose signals that come just
# before its wait (mksh does, once in some hundred times). Where there is no setsid, a sleep stays until its time is over.
_GUARD = (
    'echo "$0 ready"; x=$(command -v setsid); p=; '
    "while read -r verb pid seconds; do q=; "
    'for i in $p; do if [ "${i%:*}" = "$pid" ]; then c=${i#*:}; { kill -KILL -"$c"; kill -KILL "$c"; wait "$c"; } 2> /dev/null; '
    'else q="$q $i"; fi; done; p=$q; '
    "case $verb in "
    'watch) $x sh -c "sleep $seconds && kill -KILL -$pid" < /dev/null > /dev/null 2>&1 & p="$p $pid:$!";; '
    'kill) kill -KILL -"$pid" 2> /dev/null;; '
    'esac; echo "$0 $verb $pid"; done; '
    'for i in $p; do c=${i#*:}; kill -KILL -"${i%:*}"; kill -KILL -"$c"; kill -KILL "$c"; done 2> /dev/null'
)

MAX_COMMAND_BYTES = 120_000  # one argument of a Linux program has at most 128 KiB, and the command line is one
UNKNOWN_SIGNAL = -127
"""Return code where a signal ended a command and OpenSSH does not name it (it names 13 of them; SIGBUS is not one)."""

_KILL_WAIT_S = 2.0
_GRACE_S = 1.0
_BOARD_GRACE_S = 5
_QUIET_S = 0.25
_CHUNK_BYTES = 1 << 15
_MAX_SECONDS = 10_000_000


class NotStartedError(ConnectError):
    """The link was lost before the command was started, so it may be tried again."""


class CommandRunner:
    """Runs commands over one link; several threads may."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        """Start the guard.

        Args:
            connection: The link.
            timeout_s: Limit for that, seconds.

        Raises:
            ConnectError: The link was lost.
            CommandError: The account cannot run commands.
        """
        self._connection = connection
        self._tag = secrets.token_hex(8)
        self._guard = RunningCommand(connection, ["sh", "-c", _GUARD, self._tag], timeout_s, quoted_tag=None)
        self._lock = threading.Lock()
        self._await(f"{self._tag} ready", timeout_s)

    @property
    def connection(self) -> Connection:
        """The link."""
        return self._connection

    def start(self, argv: Sequence[str], *, timeout_s: float, seconds: float) -> RunningCommand:
        """Start a command under the guard.

        Args:
            argv: Program and arguments.
            timeout_s: Limit for the start, seconds.
            seconds: How long the board lets it run at most.

        Raises:
            NotStartedError: The link was lost before the command was started.
            RemoteTimeoutError: It was not started in time.
        """
        deadline = time.monotonic() + timeout_s
        try:
            command = RunningCommand(self._connection, argv, timeout_s, quoted_tag=self._tag)
            try:
                command.await_tag(deadline)
                self.watch(command.pid, seconds, deadline - time.monotonic())
                command.feed(b"go\n")
            except RemoteTimeoutError:
                # Whatever does not answer is better not asked again.
                self._connection.close("the board does not answer")
                command.close()
                raise
            except BaseException:
                command.close()
                raise
        except ConnectError as error:
            raise NotStartedError(error.message, hint=error.hint) from error
        return command

    def watch(self, pid: int, seconds: float, timeout_s: float) -> None:
        """Have the board kill a process group in so many seconds, instead of what was said of it before."""
        whole = math.ceil(min(seconds, _MAX_SECONDS)) + _BOARD_GRACE_S
        self._tell(f"watch {pid} {whole}", f"{self._tag} watch {pid}", timeout_s)

    def kill(self, pid: int) -> None:
        """Kill a process group now; where the board does not confirm it, the link is closed, which ends it too."""
        with self._connection.closed_after(_KILL_WAIT_S, "the board does not answer"):
            try:
                self._tell(f"kill {pid}", f"{self._tag} kill {pid}", _KILL_WAIT_S)
            except RemoteError:
                self._connection.close("the board does not answer")

    def forget(self, pid: int) -> None:
        """The command has ended; its number may belong to another one soon."""
        try:
            self._tell(f"forget {pid}", None, _KILL_WAIT_S)
        except RemoteError:
            # Only a link that is gone has this failure, and the next call on it says so.
            self._connection.close()

    def check(self, timeout_s: float) -> None:
        """Ask the guard for an answer: what the server had sent before has arrived when this returns."""
        self._tell("check 0", f"{self._tag} check 0", timeout_s)

    def _tell(self, line: str, answer: str | None, timeout_s: float) -> None:
        with self._lock:
            self._guard.feed(line.encode() + b"\n")
            if answer is not None:
                self._await(answer, timeout_s)

    def _await(self, answer: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._guard.next_line(deadline)
            if line is None:
                text = " ".join(bytes(self._guard.stderr or self._guard.stdout).decode("utf-8", "replace").split())
                raise CommandError(
                    f"{self._connection.settings.address} must run commands with a POSIX shell, found: {text or 'no answer'}.",
                    hint="give the account a login shell",
                )
            if line.endswith(answer.encode()):
                return


class RunningCommand:
    """A command on the board and its three streams.

    Attributes:
        name: Its program, for messages.
        pid: Its process group, once `await_tag` has returned.
        stdout, stderr: What it has written so far.
    """

    def __init__(
        self, connection: Connection, argv: Sequence[str], timeout_s: float, *, quoted_tag: str | None
    ) -> None:
        line = command_line(argv, quoted_tag)
        self.name = argv[0]
        self.pid = 0
        self.stdout = bytearray()
        self.stderr = bytearray()
        self._lines_at = 0
        self._connection = connection
        self._tag = quoted_tag
        with connection.translated():
            self._channel = connection.open_session(timeout_s)
            self._channel.settimeout(timeout_s)
            self._channel.exec_command(line)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._channel.fileno(), selectors.EVENT_READ)

    def feed(self, content: bytes) -> None:
        """Write all of `content` to its standard input."""
        with self._connection.translated():
            self._channel.settimeout(None)
            self._channel.sendall(content)

    def feed_some(self, content: memoryview) -> int:
        """Write what fits without waiting; the number of bytes."""
        with self._connection.translated():
            if not content or self._channel.closed or not self._channel.send_ready():
                return 0
            sent: int = self._channel.send(content[:_CHUNK_BYTES].tobytes())
            return sent

    def end_input(self) -> None:
        """Let the command see the end of its standard input."""
        with self._connection.translated():
            self._channel.shutdown_write()

    def pump(self, wait_s: float) -> bool:
        """Take what has arrived, after waiting for something up to `wait_s` seconds; whether anything came."""
        self._selector.select(max(0.0, wait_s))
        before = len(self.stdout) + len(self.stderr)
        with self._connection.translated():
            while self._channel.recv_ready():
                self.stdout += self._channel.recv(1 << 20)
            while self._channel.recv_stderr_ready():
                self.stderr += self._channel.recv_stderr(1 << 20)
        return len(self.stdout) + len(self.stderr) > before

    @property
    def output_ended(self) -> bool:
        """Whether both streams have ended and everything was taken."""
        ended = self._channel.eof_received or self._channel.closed
        return ended and not (self._channel.recv_ready() or self._channel.recv_stderr_ready())

    @property
    def exited(self) -> bool:
        """Whether the board has said how the command ended, or the channel is gone."""
        signaled = self._connection.exit_signal(self._channel) is not None
        return bool(signaled or self._channel.status_event.is_set() or self._channel.closed)

    def returncode(self, wait_s: float) -> int:
        """Exit status, or minus the number of the signal.

        Raises:
            ConnectError: The link was lost before the board said how the command ended.
        """
        if not self.exited:
            self._channel.status_event.wait(max(0.0, wait_s))
        name = self._connection.exit_signal(self._channel)
        if name is not None:
            number = getattr(signal, f"SIG{name}", None)
            return UNKNOWN_SIGNAL if number is None else -int(number)
        status: int = self._channel.exit_status
        if status < 0:
            with self._connection.translated():
                raise EOFError("the connection was closed")
        return status

    def next_line(self, deadline: float) -> bytes | None:
        """Next line of standard output without its end, or None when the output has ended.

        Raises:
            RemoteTimeoutError: None came before the deadline.
            ConnectError: The link was lost.
        """
        while True:
            end = self.stdout.find(b"\n", self._lines_at)
            if end >= 0:
                line, self._lines_at = bytes(self.stdout[self._lines_at : end]), end + 1
                return line
            if self.output_ended:
                if not self._connection.alive:
                    self.returncode(0)
                rest, self._lines_at = bytes(self.stdout[self._lines_at :]), len(self.stdout)
                return rest or None
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise RemoteTimeoutError(
                    f"{self.name} on {self._connection.settings.address} must print a line in time, found none."
                )
            self.pump(min(remaining, 0.5))

    def rest(self) -> bytes:
        """Output that `next_line` did not return."""
        return bytes(self.stdout[self._lines_at :])

    def await_tag(self, deadline: float) -> None:
        """Wait until the command is ready to start, and drop what the account's start-up files have printed before."""
        tag = f"{self._tag}".encode()
        while True:
            out, err = self.stdout.find(tag + b"\n"), self.stderr.find(tag + b" ")
            end = self.stderr.find(b"\n", err) if err >= 0 else -1
            if out >= 0 and end >= 0:
                self.pid = int(self.stderr[err + len(tag) : end])
                del self.stdout[: out + len(tag) + 1], self.stderr[: end + 1]
                return
            if self.output_ended:
                self.returncode(_GRACE_S)
                text = " ".join(bytes(self.stderr or self.stdout).decode("utf-8", "replace").split()) or "no answer"
                raise CommandError(
                    f"{self._connection.settings.address} must run commands with a POSIX shell, found: {text}."
                )
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise RemoteTimeoutError(
                    f"{self._connection.settings.address} must start {self.name} in time, it did not."
                )
            self.pump(min(remaining, 0.5))

    def close(self) -> None:
        """Give the channel back; a command that still runs sees the end of its input."""
        self._selector.close()
        self._connection.close_channel(self._channel, _KILL_WAIT_S)


def command_line(argv: Sequence[str], tag: str | None) -> bytes:
    """What the account's shell is given: a program and arguments that it passes on unchanged.

    Raises:
        ConfigError: If there is no program, or an argument has a NUL, or all is too long.
    """
    words = ["sh", "-c", _LEAD, "sh", _COMMAND, "sh", tag, *argv] if tag is not None else list(argv)
    if not argv or any("\0" in word for word in argv):
        raise ConfigError("a command must have a program, and no NUL in its arguments.")
    line = ("exec " + " ".join(shlex.quote(word) for word in words)).encode("utf-8", "surrogateescape")
    if len(line) > MAX_COMMAND_BYTES:
        raise ConfigError(
            f"a command line must have at most {MAX_COMMAND_BYTES} bytes, found {len(line)}.", hint="send data on stdin"
        )
    return line


def run_command(
    runner: CommandRunner, argv: Sequence[str], stdin: bytes, timeout_s: float, on_line: Callable[[str], None] | None
) -> CommandResult:
    """`Transport.run` over one link."""
    deadline = time.monotonic() + timeout_s
    address = runner.connection.settings.address
    late = RemoteTimeoutError(
        f"{argv[0] if argv else 'a command'} on {address} must end within {timeout_s:g} s, it was killed."
    )
    with runner.connection.closed_after(timeout_s + _GRACE_S, "the deadline is over"):
        try:
            command = runner.start(argv, timeout_s=timeout_s, seconds=timeout_s)
            try:
                result = _converse(runner, command, stdin, deadline, on_line, late)
            except BaseException:
                runner.kill(command.pid)
                raise
            else:
                runner.forget(command.pid)
            finally:
                command.close()
        except (ConnectError, RemoteTimeoutError) as error:
            if error is not late and time.monotonic() >= deadline:
                raise late from error
            raise
    return result


def _converse(
    runner: CommandRunner,
    command: RunningCommand,
    stdin: bytes,
    deadline: float,
    on_line: Callable[[str], None] | None,
    late: RemoteTimeoutError,
) -> CommandResult:
    unsent = memoryview(stdin)
    told = 0
    open_input = True
    while True:
        if open_input:
            unsent = unsent[command.feed_some(unsent) :]
            if not unsent:
                command.end_input()
                open_input = False
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise late
        # With input to send there is nothing to wait on but time: the window opens without a sign.
        came = command.pump(min(remaining, 0.005 if unsent else _QUIET_S))
        told = _tell_lines(command.stdout, told, on_line)
        if command.output_ended or (command.exited and not came and _is_drained(runner, command, remaining)):
            break
    returncode = command.returncode(deadline - time.monotonic())
    if on_line is not None and told < len(command.stdout):
        on_line(command.stdout[told:].decode("utf-8", "replace"))
    return CommandResult(returncode, bytes(command.stdout), bytes(command.stderr))


def _is_drained(runner: CommandRunner, command: RunningCommand, remaining: float) -> bool:
    """Whether all output of a command that has exited is here, though a process that it left behind keeps it open."""
    runner.check(remaining)
    return not command.pump(0)


def _tell_lines(stdout: bytearray, told: int, on_line: Callable[[str], None] | None) -> int:
    while on_line is not None and (end := stdout.find(b"\n", told)) >= 0:
        line, told = stdout[told:end].decode("utf-8", "replace"), end + 1
        on_line(line)
    return told
