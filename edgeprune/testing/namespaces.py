"""Several hosts on one machine, those of a fleet hidden behind a bastion: a network namespace and a real sshd for each.

::

    host ── bastion ── board 1
                    ├─ board 2
                    └─ ...

Nothing of it is in the machine's own network: the host that works with the boards is a namespace too. What shall run there goes
through `HiddenFleet.call`, programs through `HiddenFleet.run`. The host has no route to the boards; the bastion forwards nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from edgeprune.testing.ssh_server import MissingPartError, program
from edgeprune.testing.sshd import OpenSshServer

_Result = TypeVar("_Result")

_CLONE_NEWNET = 0x40000000  # Linux, include/uapi/linux/sched.h
_PREFIX = "ep-"
_PORT = 22
_HOST, _BASTION = "10.213.0.1", "10.213.0.2"


class HiddenFleet:
    """A host, a bastion, and boards that only the bastion reaches. Use it as a context manager.

    Attributes:
        boards: Names of the boards: ``board1``, ``board2``, ...
        config: ssh_config for the host: an alias for each board, with ``ProxyJump bastion``, and one for the bastion.
        servers: The sshd of each board, and that of ``bastion``.
    """

    def __init__(self, folder: Path, *, boards: int = 3) -> None:
        """Nothing is made yet.

        Args:
            folder: An existing folder for keys, configurations and logs.
            boards: Number of boards.

        Raises:
            MissingPartError: Not root, or iproute2 is missing.
        """
        self._ip = program("ip", "iproute2")
        if os.geteuid() != 0:
            raise MissingPartError("network namespaces are made by root only")
        self.folder = folder
        self.boards = tuple(f"board{number + 1}" for number in range(boards))
        self.config = folder / "fleet_config"
        self.servers: dict[str, OpenSshServer] = {}
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> HiddenFleet:
        remove_stale(self._ip)
        try:
            self._make()
        except BaseException:
            self._ends.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.close()

    def address(self, board: str) -> str:
        """IPv4 address of a board, which the bastion alone reaches."""
        return f"10.213.{self.boards.index(board) + 1}.2"

    def run(
        self, argv: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on the host."""
        return subprocess.run(
            [*self._inside("host"), *argv],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def call(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns or raises, called on the host: in a thread there, whose own threads and programs are there too."""
        with ThreadPoolExecutor(1, initializer=self._move_thread) as thread:
            return thread.submit(work).result()

    def _move_thread(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        with Path(f"/run/netns/{self._name('host')}").open("rb") as space:
            if library.setns(space.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def drop(self, board: str) -> None:
        """Take the link between the bastion and a board down: what is sent is lost, and nobody is told."""
        self._call(*self._inside("bastion"), "ip", "link", "set", f"to-{board}", "down")

    def mend(self, board: str) -> None:
        """Bring the link up again."""
        self._call(*self._inside("bastion"), "ip", "link", "set", f"to-{board}", "up")

    def _make(self) -> None:
        for name in ("host", "bastion", *self.boards):
            self._add_namespace(name)
        self._link("host", "to-bastion", _HOST, "bastion", "to-host", _BASTION)
        for number, board in enumerate(self.boards, 1):
            self._link("bastion", f"to-{board}", f"10.213.{number}.1", board, "to-bastion", f"10.213.{number}.2")
        # A new namespace takes this over from the machine, which may be a router.
        self._call(*self._inside("bastion"), "sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward")
        for name, address in {"bastion": _BASTION, **{board: self.address(board) for board in self.boards}}.items():
            place = self.folder / name
            place.mkdir()
            server = OpenSshServer(
                place, host=address, port=_PORT, within=self._inside(name), environment={"BOARD": name}
            )
            self.servers[name] = self._ends.enter_context(server)
        self.config.write_text("".join(self._entry(name) for name in self.servers))

    def _entry(self, name: str) -> str:
        server = self.servers[name]
        jump = "" if name == "bastion" else "  ProxyJump bastion\n"
        return (
            f"Host {name}\n  HostName {server.host}\n  User {server.user}\n  IdentityFile {server.identity}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {server.known_hosts}\n  GlobalKnownHostsFile /dev/null\n{jump}"
        )

    def _name(self, name: str) -> str:
        return f"{_PREFIX}{os.getpid()}-{name}"

    def _inside(self, name: str) -> list[str]:
        return [self._ip, "netns", "exec", self._name(name)]

    def _add_namespace(self, name: str) -> None:
        added = subprocess.run(
            [self._ip, "netns", "add", self._name(name)], capture_output=True, text=True, check=False
        )
        if added.returncode:
            raise MissingPartError(f"no network namespace can be made here: {' '.join(added.stderr.split())}")
        self._ends.callback(_remove, self._ip, self._name(name))
        self._call(self._ip, "-n", self._name(name), "link", "set", "lo", "up")

    def _link(self, one: str, one_end: str, one_address: str, other: str, other_end: str, other_address: str) -> None:
        """Join two namespaces; no end of the link is ever outside."""
        first, second = self._name(one), self._name(other)
        made = subprocess.run(
            [self._ip, "link", "add", one_end, "netns", first, "type", "veth", "peer", other_end, "netns", second],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise MissingPartError(f"no pair of network interfaces can be made here: {' '.join(made.stderr.split())}")
        for space, end, address in ((first, one_end, one_address), (second, other_end, other_address)):
            self._call(self._ip, "-n", space, "address", "add", f"{address}/30", "dev", end)
            self._call(self._ip, "-n", space, "link", "set", end, "up")

    def _call(self, *argv: str) -> None:
        subprocess.run(argv, check=True, capture_output=True)


def remove_stale(ip: str) -> None:
    """Remove the namespaces of test runs that were killed."""
    listed = subprocess.run([ip, "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name in re.findall(rf"^({_PREFIX}\d+-\S+)", listed, re.M):
        if not Path(f"/proc/{name.split('-')[1]}").exists():
            _remove(ip, name)


def _remove(ip: str, name: str) -> None:
    # The interfaces go with the last process in there.
    pids = subprocess.run([ip, "netns", "pids", name], capture_output=True, text=True, check=False).stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), 9)
    subprocess.run([ip, "netns", "delete", name], capture_output=True, check=False)
