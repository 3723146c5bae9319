"""A real OpenSSH server on the loopback address, with keys of its own, for tests. It changes nothing on the machine.

Only `MissingSshdError` tells that there is no server program; everything else that goes wrong is an error of the test.
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

from edgeprune.boards.known_hosts import fingerprint
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.ssh_server import MissingPartError, SshServer, program


class MissingSshdError(MissingPartError):
    """There is no OpenSSH server program on this machine."""


class OpenSshServer(SshServer):
    """One ``sshd`` in the foreground; see `SshServer`."""

    process_name = "sshd"

    def __init__(
        self,
        folder: Path,
        *,
        key_types: Sequence[str] = ("ed25519",),
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        sftp: str = "internal-sftp",
        host: str = "127.0.0.1",
        port: int | None = None,
        within: Sequence[str] = (),
    ) -> None:
        """Write keys and configuration; nothing runs yet.

        Args:
            folder: An existing folder for its files.
            key_types: Types of its host keys, as ``ssh-keygen -t`` names them.
            environment: Variables that commands on it get; they come from nowhere else but sshd.
            options: Further lines for sshd_config.
            sftp: Its SFTP server: a program, or the one that is built in.
            host: Address to listen on.
            port: Port to listen on; a free one by default.
            within: Words before the server's command, e.g. those that enter a network namespace.

        Raises:
            MissingSshdError: If there is no sshd or no ssh-keygen.
        """
        try:
            self._sshd = program("sshd", "openssh-server")
            program("ssh-keygen", "openssh-client")
        except MissingPartError as error:
            raise MissingSshdError(str(error)) from error
        super().__init__(folder, host=host, port=port, within=within)
        self._host_keys = [self.new_key(f"host_{kind}", kind) for kind in key_types]
        # bash reads ~/.bashrc for sshd's commands, but only at level 1; tests shall not depend on what is in there.
        self._environment = {"SHLVL": "1", **(environment or {})}
        self._options = tuple(options)
        self._sftp = sftp

    def public_keys(self) -> list[str]:
        return [" ".join(key.with_name(f"{key.name}.pub").read_text().split()[:2]) for key in self._host_keys]

    def board_behind(self, link: FaultyLink, root: Path) -> str:
        """Address of a board on this machine, with this Python, that is reached over a link to this server only.

        Args:
            link: Forwards to this server.
            root: The board's folder.
        """
        options = {
            "python": sys.executable,
            "root": str(root),
            "identity": str(self.identity),
            "host_key": fingerprint(base64.b64decode(self.public_keys()[0].split()[1])),
        }
        return f"ssh://{self.user}@{link.host}:{link.port}?{urlencode(options)}"

    def _command(self) -> list[str]:
        return [self._sshd, "-D", "-e", "-f", str(self.folder / "sshd_config")]

    def _write_configuration(self) -> None:
        if os.geteuid() == 0:
            # Debian makes it when its own service starts; sshd does not run as root without it.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
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
