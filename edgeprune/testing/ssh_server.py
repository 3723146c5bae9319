"""What the SSH servers of tests have in common: keys of their own, a free port, an end that leaves nothing running."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

_Self = TypeVar("_Self", bound="SshServer")

_START_TIMEOUT_S = 10.0
_ATTEMPTS = 5

# Connects and reads the first bytes, for a server that only another network can reach.
_CONNECT = (
    "import socket, sys\n"
    "with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1.0) as stream:\n"
    "    sys.exit(stream.recv(4) != b'SSH-')\n"
)


class MissingPartError(RuntimeError):
    """This machine lacks something that a test board needs; the message says what in one sentence."""


class SshServer(ABC):
    """One SSH server in the foreground, for the current user, with key login only. Use it as a context manager.

    Attributes:
        folder: Holds its configuration, keys and log.
        host: Where it listens.
        port: A free port, chosen at `start`, or the one that was asked for.
        user: Who can log in.
        identity: Private key that is accepted.
        known_hosts: File with the server's host keys, as ``ssh`` would have written it.
        config: ssh_config file with the alias ``board`` for this server: address, user, identity and known_hosts.
        within: Words before every command that concerns the server, e.g. those that enter its network.
    """

    process_name = ""
    """How ``ps`` calls the server's processes."""

    def __init__(
        self, folder: Path, *, host: str = "127.0.0.1", port: int | None = None, within: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.host = host
        self.port = port or 0
        self.within = tuple(within)
        self.user = getpass.getuser()
        self.identity = self.new_key("user_key")
        self.known_hosts = folder / "known_hosts"
        self.config = folder / "ssh_config"
        self._chosen_port = port
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def public_keys(self) -> list[str]:
        """``type base64`` of each host key."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The server in the foreground; it logs to its standard error."""

    @abstractmethod
    def _write_configuration(self) -> None:
        """Write what the server reads at its start; the port is known now."""

    @property
    def target(self) -> str:
        """``user@host:port``."""
        return f"{self.user}@{self.host}:{self.port}"

    @property
    def log(self) -> str:
        """What the server has logged."""
        return self._log_path.read_text(errors="replace")

    @property
    def _log_path(self) -> Path:
        return self.folder / f"{self.process_name}.log"

    def new_key(self, name: str, kind: str = "ed25519") -> Path:
        """Make a key pair of OpenSSH's without a passphrase in `folder`; the path of its private half."""
        path = self.folder / name
        subprocess.run(
            [program("ssh-keygen", "openssh-client"), "-q", "-t", kind, "-N", "", "-C", name, "-f", str(path)],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return path

    def start(self: _Self) -> _Self:
        """Run the server until `stop`; returns once it answers."""
        for _ in range(_ATTEMPTS):
            self.port = self._chosen_port or self._free_port()
            self._write_configuration()
            self._write_client_files()
            with self._log_path.open("ab") as log:
                # A session of its own, so that Ctrl-C in a terminal ends the test, which then ends the server.
                self._process = subprocess.Popen(
                    [*self.within, *self._command()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            try:
                answers = self._answers()
            except BaseException:
                self.stop()
                raise
            if answers:
                return self
            self.stop()
        raise RuntimeError(f"{self.process_name} must answer on {self.host}, it says: {self.log[-1000:]}")

    def stop(self) -> None:
        """End the server and the connections that it serves; a second call does nothing."""
        if self._process is not None:
            self.cut()
            self._process = None

    def cut(self) -> None:
        """Kill the server with all its connections; commands that run on it are left alone, as when a link is lost."""
        if self._process is None:
            return
        # Each connection has processes of its own, in sessions of their own, so there is no group to kill.
        listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, check=True)
        rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
        doomed = {self._process.pid}
        while (
            more := {int(pid) for pid, ppid, name in rows if int(ppid) in doomed and self.process_name in name} - doomed
        ):
            doomed |= more
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(10)

    def __enter__(self: _Self) -> _Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            port: int = probe.getsockname()[1]
            return port

    def _answers(self) -> bool:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            try:
                if self._greets():
                    return True
            except OSError:
                pass
            time.sleep(0.02)
        return False

    def _greets(self) -> bool:
        if self.within:
            connect = [*self.within, sys.executable, "-S", "-c", _CONNECT, self.host, str(self.port)]
            return subprocess.run(connect, capture_output=True, check=False).returncode == 0
        with socket.create_connection((self.host, self.port), timeout=1.0) as stream:
            return stream.recv(4) == b"SSH-"

    def _write_client_files(self) -> None:
        name = self.host if self.port == 22 else f"[{self.host}]:{self.port}"
        self.known_hosts.write_text("".join(f"{name} {key}\n" for key in self.public_keys()))
        self.config.write_text(
            f"Host board\n  HostName {self.host}\n  Port {self.port}\n  User {self.user}\n"
            f'  IdentityFile "{self.identity}"\n  IdentitiesOnly yes\n'
            f'  UserKnownHostsFile "{self.known_hosts}"\n  GlobalKnownHostsFile /dev/null\n'
        )


def program(name: str, package: str) -> str:
    """Path of a program that tests need.

    Raises:
        MissingPartError: It is not on this machine.
    """
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])
    path = shutil.which(name, path=search)
    if path is None:
        raise MissingPartError(f"no {name} on this machine; on Debian: apt install {package}")
    return path


def with_own_mounts() -> tuple[str, ...]:
    """Words before a command whose mounts nobody else shall see; they go with its last process.

    Raises:
        MissingPartError: Mount namespaces cannot be made here.
    """
    words = (program("unshare", "util-linux"), "--mount", "--propagation", "slave")
    tried = subprocess.run([*words, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise MissingPartError(f"no mount namespace can be made here: {' '.join(tried.stderr.split())}")
    return words
