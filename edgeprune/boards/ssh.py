"""A board reached over SSH.

The user's ssh settings, keys, agent and jump hosts are used as they are. Host keys are always checked and never added. The
link opens at the first call, and opens again at the next call after it was lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from edgeprune.boards.ssh_config import SshSettings, SshTarget, jumps_of, resolve, with_overrides
from edgeprune.boards.transport import CommandResult, Process, Progress, Transport
from edgeprune.errors import ConfigError, ConnectError, RemoteError

if TYPE_CHECKING:
    from edgeprune.boards.ssh_commands import CommandRunner, RunningCommand
    from edgeprune.boards.ssh_files import FileCopier

logger = logging.getLogger("edgeprune.boards.ssh")

_Result = TypeVar("_Result")

_CLOSE_S = 5.0
_LEASE_S = 60.0  # how long a lock outlives a link that died without the board noticing
_RENEW_S = 15.0
_ANSWER_S = 5.0


class SshTransport(Transport):
    """Runs commands and copies files over one SSH link. Several threads may use it at once."""

    def __init__(
        self,
        target: str,
        *,
        host_key: str | None = None,
        identity: Path | None = None,
        known_hosts: Path | None = None,
        config: Path | None = None,
        jump: str | None = None,
        connect_timeout_s: float = 10.0,
    ) -> None:
        """Nothing is connected yet.

        Args:
            target: ``[ssh://][user@]host[:port]`` or an alias of the ssh configuration.
            host_key: ``SHA256:...`` that the host's key must have, for a host that known_hosts does not have.
            identity: Private key file to use instead of the configured ones and the agent's.
            known_hosts: File with trusted host keys to use instead of the configured ones.
            config: ssh_config file to use instead of the user's (also: environment variable EDGEPRUNE_SSH_CONFIG).
            jump: Hosts to go through instead of the configured ones, nearest first, as ``ssh -J`` takes them.
            connect_timeout_s: Limit for each of: reaching a hop, the handshake, logging in, seconds.

        Raises:
            ConfigError: The target or a jump host is not one, or holds a password; the fingerprint or the key file is not valid.
        """
        SshTarget.parse(target)
        if host_key is not None and not host_key.startswith("SHA256:"):
            raise ConfigError(f"a host key's fingerprint must read SHA256:..., found {host_key!r}.")
        if identity is not None and not identity.expanduser().is_file():
            raise ConfigError(f"the identity must be a private key file, found none at {identity}.")
        self._target = target
        self._pinned = host_key.rstrip("=") if host_key else None
        self._identity = identity
        self._known_hosts = known_hosts
        self._config = config
        self._jumps = jumps_of(jump) if jump else ()
        self._timeout_s = connect_timeout_s
        self._runner: CommandRunner | None = None
        self._has_sftp = True  # until its server says otherwise
        self._lock = threading.Lock()

    @cached_property
    def settings(self) -> SshSettings:
        """Where and as whom it connects, from the target and the ssh configuration."""
        found = resolve(self._target, config=self._config)
        return with_overrides(found, identity=self._identity, known_hosts=self._known_hosts, jumps=self._jumps)

    @property
    def address(self) -> str:
        return self.settings.address

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float = 60.0,
        on_line: Callable[[str], None] | None = None,
    ) -> CommandResult:
        """See `Transport.run`. Return code -127: killed by a signal that the board's server does not name."""
        from edgeprune.boards.ssh_commands import run_command

        return self._with_link(lambda runner: run_command(runner, argv, stdin, timeout_s, on_line))

    def open_process(self, argv: Sequence[str], *, stdin: bytes = b"") -> Process:
        def start(runner: CommandRunner) -> Process:
            with runner.connection.closed_after(self._timeout_s + 1, "the board does not answer"):
                command = runner.start(argv, timeout_s=self._timeout_s, seconds=_LEASE_S)
                process = _SshProcess(runner, command)
                try:
                    command.feed(stdin)
                except BaseException:
                    process.close()
                    raise
            return process

        return self._with_link(start)

    def put(self, local: Path, remote: str, *, progress: Progress | None = None) -> None:
        self._copy(lambda copier: copier.put(local, remote, progress))

    def get(self, remote: str, local: Path) -> None:
        self._copy(lambda copier: copier.get(remote, local))

    def close(self) -> None:
        with self._lock:
            if self._runner is not None:
                self._runner.connection.close()
                self._runner = None

    def _copy(self, work: Callable[[FileCopier], None]) -> None:
        """Copy over SFTP, or through the shell of a board whose server has none."""
        from edgeprune.boards.ssh_files import FileCopier, NoSftpError
        from edgeprune.boards.ssh_shell_files import ShellCopier

        if self._has_sftp:
            copier = self._copier(FileCopier)
            runner, _ = self._link()
            try:
                work(copier)
            except NoSftpError as error:
                # A link that is lost at this moment looks the same; over one that is not, the guard answers.
                runner.check(self._timeout_s)
                logger.info("%s Files go through its shell.", error.message)
                self._has_sftp = False
            else:
                return
        work(self._copier(ShellCopier))

    def _copier(self, kind: type[FileCopier]) -> FileCopier:
        # One harmless command finds out whether an old link still works, and opens a new one if not.
        self.run(["true"], timeout_s=self._timeout_s)
        runner, _ = self._link()
        return kind(
            runner.connection,
            lambda argv, seconds, stdin: self.run(argv, stdin=stdin, timeout_s=seconds),
            self._timeout_s,
        )

    def _link(self) -> tuple[CommandRunner, bool]:
        """The link, and whether it was opened just now."""
        from edgeprune.boards.ssh_commands import CommandRunner
        from edgeprune.boards.ssh_connection import connect

        with self._lock:
            if self._runner is not None and self._runner.connection.alive:
                return self._runner, False
            connection = connect(self.settings, pinned=self._pinned, config=self._config, timeout_s=self._timeout_s)
            try:
                with connection.closed_after(self._timeout_s + 1, "the board does not answer"):
                    self._runner = CommandRunner(connection, self._timeout_s)
            except BaseException:
                connection.close()
                raise
            return self._runner, True

    def _with_link(self, work: Callable[[CommandRunner], _Result]) -> _Result:
        """Do something over the link; once more over a new one where an old one turns out dead before it was begun."""
        from edgeprune.boards.ssh_commands import NotStartedError

        runner, fresh = self._link()
        try:
            return work(runner)
        except NotStartedError:
            if fresh:
                raise
            runner.connection.close()
            return work(self._link()[0])


class _SshProcess(Process):
    """A command with an open input, and a lease on the board that this end renews."""

    def __init__(self, runner: CommandRunner, command: RunningCommand) -> None:
        self._runner = runner
        self._command = command
        self._result: CommandResult | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._renew, name=f"lease of {command.name}", daemon=True).start()

    def readline(self, timeout_s: float) -> str | None:
        line = self._command.next_line(time.monotonic() + timeout_s)
        return None if line is None else line.decode("utf-8", "replace")

    def close(self) -> CommandResult:
        if self._result is None:
            self._ended.set()
            try:
                self._result = self._end()
            finally:
                self._command.close()
        return self._result

    def _end(self) -> CommandResult:
        command = self._command
        deadline = time.monotonic() + _CLOSE_S
        with self._runner.connection.closed_after(2 * _CLOSE_S, "the board does not answer"):
            command.end_input()
            while not (command.output_ended or command.exited) and time.monotonic() < deadline:
                command.pump(0.25)
            if command.exited or command.output_ended:
                self._runner.forget(command.pid)
            else:
                self._runner.kill(command.pid)
            returncode = command.returncode(_CLOSE_S)
            command.pump(0)
        return CommandResult(returncode, command.rest(), bytes(command.stderr))

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_S):
            try:
                self._runner.watch(self._command.pid, _LEASE_S, _ANSWER_S)
            except ConnectError as error:
                logger.debug("%s: its lease ends with the link: %s", self._command.name, error)
                return
            except RemoteError as error:
                # A board under full load answers late: what was sent is still read, and there is a next time.
                logger.debug("%s: its lease was not confirmed: %s", self._command.name, error)
