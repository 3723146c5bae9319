"""A real OpenSSH server on the loopback address, with keys of its own, for tests. It changes nothing on the machine.

Only `MissingSshdError` tells that there is no server program; everything else that goes wrong is an error of the test.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

_START_TIMEOUT_S = 10.0
_ATTEMPTS = 5


class MissingSshdError(RuntimeError):
    """There is no OpenSSH server program on this machine."""


class OpenSshServer:
    """One ``sshd`` in the foreground, for the current user, with key login only.

    Attributes:
        folder: Holds its configuration, keys and log.
        host: Always ``127.0.0.1``.
        port: A free port, chosen at `start`.
        user: Who can log in.
        identity: Private key that is accepted.
        known_hosts: File with the server's host keys, as ``ssh`` would have written it.
        config: ssh_config file with the alias ``board`` for this server: address, user, identity and known_hosts.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        folder: Path,
        *,
        key_types: Sequence[str] = ("ed25519",),
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        sftp: str = "internal-sftp",
    ) -> None:
        """Write keys and configuration; nothing runs yet.

        Args:
            folder: An existing folder for its files.
            key_types: Types of its host keys, as ``ssh-keygen -t`` names them.
            environment: Variables that commands on it get; they come from nowhere else but sshd.
            options: Further lines for sshd_config.
            sftp: Its SFTP server: a program, or the one that is built in.

        Raises:
            MissingSshdError: If there is no sshd or no ssh-keygen.
        """
        search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])
        programs = {name: shutil.which(name, path=search) for name in ("sshd", "ssh-keygen")}
        missing = [name for name, path in programs.items() if path is None]
        if missing:
            raise MissingSshdError(
                f"no {' and no '.join(missing)} on this machine; on Debian: apt install openssh-server"
            )
        self._sshd = str(programs["sshd"])
        self._keygen = str(programs["ssh-keygen"])
        self.folder = folder
        self.user = getpass.getuser()
        self.port = 0
        self.identity = self.new_key("user_key")
        self.known_hosts = folder / "known_hosts"
        self.config = folder / "ssh_config"
        self._host_keys = [self.new_key(f"host_{kind}", kind) for kind in key_types]
        # bash reads ~/.bashrc for sshd's commands, but only at level 1; tests shall not depend on what is in there.
        self._environment = {"SHLVL": "1", **(environment or {})}
        self._options = tuple(options)
        self._sftp = sftp
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        """``user@host:port``."""
        return f"{self.user}@{self.host}:{self.port}"

    @property
    def log(self) -> str:
        """What the server has logged."""
        return (self.folder / "sshd.log").read_text(errors="replace")

    def new_key(self, name: str, kind: str = "ed25519") -> Path:
        """Make a key pair without a passphrase in `folder`; the path of its private half."""
        path = self.folder / name
        subprocess.run(
            [self._keygen, "-q", "-t", kind, "-N", "", "-C", name, "-f", str(path)],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return path

    def public_keys(self) -> list[str]:
        """``type base64`` of each host key."""
        return [" ".join(key.with_name(f"{key.name}.pub").read_text().split()[:2]) for key in self._host_keys]

    def start(self) -> OpenSshServer:
        """Run the server until `stop`; returns once it answers."""
        if os.geteuid() == 0:
            # Debian makes it when its own service starts; sshd does not run as root without it.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for _ in range(_ATTEMPTS):
            with socket.socket() as probe:
                probe.bind((self.host, 0))
                self.port = probe.getsockname()[1]
            self._write_configuration()
            with (self.folder / "sshd.log").open("ab") as log:
                # A session of its own, so that Ctrl-C in a terminal ends the test, which then ends the server.
                self._process = subprocess.Popen(
                    [self._sshd, "-D", "-e", "-f", str(self.folder / "sshd_config")],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            if self._answers():
                return self
            self.stop()
        raise RuntimeError(f"sshd must answer on {self.host}, it says: {self.log[-1000:]}")

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
        while more := {int(pid) for pid, ppid, name in rows if int(ppid) in doomed and "sshd" in name} - doomed:
            doomed |= more
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(10)

    def __enter__(self) -> OpenSshServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answers(self) -> bool:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            try:
                with socket.create_connection((self.host, self.port), timeout=1.0) as stream:
                    return stream.recv(4) == b"SSH-"
            except OSError:
                time.sleep(0.02)
        return False

    def _write_configuration(self) -> None:
        authorized = self.folder / "authorized_keys"
        authorized.write_text((self.folder / "user_key.pub").read_text())
        lines = [
            f"ListenAddress {self.host}",
            f"Port {self.port}",
            *(f'HostKey "{key}"' for key in self._host_keys),
            f'AuthorizedKeysFile "{authorized}"',
            f'PidFile "{self.folder / "sshd.pid"}"',
            # The folders of tests may be writable for others.
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "UseDNS no",
            "MaxStartups 100",
            "LogLevel VERBOSE",
            f"Subsystem sftp {self._sftp}",
            *self._options,
        ]
        # One line: of several, sshd takes the first.
        lines.append("SetEnv " + " ".join(f'"{name}={value}"' for name, value in self._environment.items()))
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        self.known_hosts.write_text("".join(f"[{self.host}]:{self.port} {key}\n" for key in self.public_keys()))
        self.config.write_text(
            f"Host board\n  HostName {self.host}\n  Port {self.port}\n  User {self.user}\n"
            f'  IdentityFile "{self.identity}"\n  IdentitiesOnly yes\n'
            f'  UserKnownHostsFile "{self.known_hosts}"\n  GlobalKnownHostsFile /dev/null\n'
        )
