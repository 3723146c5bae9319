"""A real dropbear server on the loopback address: the SSH server of small boards, if wanted with BusyBox around it.

dropbear takes authorized keys from nowhere but the home folder, and BusyBox boards have its programs where others have
coreutils. So the server gets a mount namespace of its own with another home folder and other programs mounted in; the rest of
the machine does not see them, and they go with the server. That takes root.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

from edgeprune.testing.ssh_server import MissingPartError, SshServer, program, with_own_mounts

BUSYBOX_APPLETS = (
    *(
        "cat",
        "cut",
        "dd",
        "df",
        "head",
        "id",
        "kill",
        "ls",
        "mkdir",
        "mktemp",
        "mv",
        "printf",
        "rm",
        "rmdir",
        "setsid",
        "sh",
    ),
    *("sha256sum", "sleep", "stat", "tail", "tr", "true", "uname", "wc"),
)
"""What a BusyBox board has from BusyBox; its Python is a real one."""

SFTP_SERVERS = ("/usr/lib/sftp-server", "/usr/libexec/sftp-server", "/usr/lib/openssh/sftp-server")
"""Where builds of dropbear look for an SFTP server, which is not part of it."""

# Pairs of what is mounted and where, then -- and the server. Mounts from outside still arrive, those in here stay in here.
_MOUNT = 'while [ "$1" != -- ]; do mount --bind -- "$1" "$2" || exit 1; shift 2; done; shift; exec "$@"'


class DropbearServer(SshServer):
    """One ``dropbear`` in the foreground; see `SshServer`.

    Attributes:
        home: Home folder of who logs in; empty but for the authorized keys.
    """

    process_name = "dropbear"

    def __init__(
        self, folder: Path, *, key_types: tuple[str, ...] = ("ed25519",), busybox: bool = False, sftp: bool = True
    ) -> None:
        """Write keys and configuration; nothing runs yet.

        Args:
            folder: An existing folder for its files.
            key_types: Types of its host keys, as ``dropbearkey -t`` names them.
            busybox: Whether the login shell and the small programs are BusyBox's.
            sftp: Whether there is an SFTP server; without one copies go through the shell.

        Raises:
            MissingPartError: dropbear, BusyBox or root's rights are missing.
        """
        self._dropbear = program("dropbear", "dropbear-bin")
        self._dropbearkey = program("dropbearkey", "dropbear-bin")
        if os.geteuid() != 0:
            raise MissingPartError("a dropbear with a home folder of its own is started by root only")
        self._apart = with_own_mounts()
        self._busybox = program("busybox", "busybox") if busybox else None
        super().__init__(folder)
        self.home = folder / "home"
        self._sftp = sftp
        self._host_keys = {kind: folder / f"dropbear_{kind}_host_key" for kind in key_types}
        for kind, path in self._host_keys.items():
            subprocess.run([self._dropbearkey, "-t", kind, "-f", str(path)], check=True, capture_output=True)

    def public_keys(self) -> list[str]:
        shown = [
            subprocess.run(
                [self._dropbearkey, "-y", "-f", str(path)], check=True, capture_output=True, text=True
            ).stdout
            for path in self._host_keys.values()
        ]
        return [" ".join(line.split()[:2]) for text in shown for line in text.splitlines() if " AAAA" in line]

    def _command(self) -> list[str]:
        keys = [word for path in self._host_keys.values() for word in ("-r", str(path))]
        address = f"{self.host}:{self.port}"
        pid = str(self.folder / "dropbear.pid")
        mounts = [str(path) for pair in self._mounts() for path in pair]
        return [
            *(*self._apart, "/bin/sh", "-c", _MOUNT, "sh", *mounts, "--"),
            # In the foreground, log to standard error, no passwords.
            *(self._dropbear, "-F", "-E", "-s", "-p", address, "-P", pid, *keys),
        ]

    def _mounts(self) -> Iterator[tuple[Path, Path]]:
        yield self.folder / "passwd", Path("/etc/passwd")
        if not self._sftp:
            for place in SFTP_SERVERS:
                if Path(place).exists():
                    yield Path(os.devnull), Path(place).resolve()
        if self._busybox is not None:
            for name in BUSYBOX_APPLETS:
                yield Path(self._busybox), Path(program(name, "coreutils")).resolve()

    def _write_configuration(self) -> None:
        # dropbear refuses keys in folders that others may write to.
        keys = self.home / ".ssh"
        keys.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.home.chmod(0o700)
        authorized = keys / "authorized_keys"
        authorized.write_text((self.folder / "user_key.pub").read_text())
        authorized.chmod(0o600)
        user = pwd.getpwnam(self.user)
        shell = "/bin/sh" if self._busybox is not None else user.pw_shell
        own = f"{user.pw_name}:x:{user.pw_uid}:{user.pw_gid}::{self.home}:{shell}"
        others = [line for line in Path("/etc/passwd").read_text().splitlines() if line.split(":")[0] != self.user]
        (self.folder / "passwd").write_text("\n".join([own, *others]) + "\n")
