"""The way to a board: TCP or a proxy command to the first hop, handshakes, and through jump hosts to the last one.

A handshake proves that the other end has a host key; which keys are trusted is decided with `known_hosts`. Before the
handshake the client says which types of key it wants, so it asks for those that are known of the host first.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import paramiko
from paramiko.common import MSG_CHANNEL_REQUEST
from paramiko.packet import Packetizer

from edgeprune.boards.known_hosts import KnownHosts, fingerprint, host_names, read_known_hosts
from edgeprune.boards.ssh_config import SshSettings, resolve
from edgeprune.boards.ssh_login import log_in
from edgeprune.errors import ConfigError, ConnectError

logger = logging.getLogger("edgeprune.boards.ssh")

_MAX_HOPS = 8
_PROXY_END_S = 2.0

# Algorithms per key type as it stands in known_hosts; the order is that of OpenSSH.
ALGORITHMS = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}

LINK_ERRORS = (paramiko.SSHException, EOFError, OSError)
"""What paramiko raises when a link fails."""


def one_line(error: BaseException) -> str:
    """Text of an exception on one line, its type where it has no text."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class _Packetizer(Packetizer):  # type: ignore[misc]
    """Notes that the other end was heard, and how commands were killed, which paramiko reads over."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.heard = True
        self.exit_signals: dict[int, str] = {}

    def read_message(self) -> tuple[int, Any]:
        kind, message = super().read_message()
        self.heard = True
        if kind == MSG_CHANNEL_REQUEST:
            copy = paramiko.Message(message.asbytes())
            channel = copy.get_int()
            if copy.get_text() == "exit-signal":
                copy.get_boolean()
                self.exit_signals[channel] = copy.get_text()
        return kind, message


@dataclass(frozen=True)
class ShownKey:
    """The host key that a server showed."""

    key_type: str
    key: bytes

    @property
    def fingerprint(self) -> str:
        """``SHA256:...``"""
        return fingerprint(self.key)


def hops_to(settings: SshSettings, config: Path | None, depth: int = 0) -> list[SshSettings]:
    if depth > _MAX_HOPS:
        raise ConfigError(
            f"ProxyJump must lead somewhere, {settings.host} is more than {_MAX_HOPS} hops away or in a loop."
        )
    hops: list[SshSettings] = []
    for position, name in enumerate(settings.jumps):
        hop = resolve(name, config=config)
        # As in OpenSSH: of several hops only the first may have a ProxyJump of its own.
        hops += hops_to(hop, config, depth + 1) if position == 0 else [replace(hop, jumps=(), command=None)]
    return [*hops, settings]


def preferred(known: KnownHosts, settings: SshSettings) -> tuple[str, ...]:
    names = host_names(settings.host, settings.port, settings.host_key_alias)
    types = [*(name for name in known.key_types(names) if name in ALGORITHMS), *ALGORITHMS]
    return tuple(dict.fromkeys(algorithm for name in types for algorithm in ALGORITHMS[name]))


def check_host_key(known: KnownHosts, shown: ShownKey, settings: SshSettings, *, jump: bool = False) -> None:
    names = host_names(settings.host, settings.port, settings.host_key_alias)
    known.check(names, shown.key_type, shown.key, address=settings.address, target=settings.target, jump=jump)


class NoSuchKeyError(ConnectError):
    """The server has no host key of the types asked for."""


class Route:
    """The hops to a board while they are being opened; what is open is closed again if the block does not finish."""

    def __init__(self, hops: Sequence[SshSettings], timeout_s: float) -> None:
        self._hops = hops
        self._timeout_s = timeout_s
        self._open: list[Any] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._done = False

    @property
    def settings(self) -> SshSettings:
        return self._hops[-1]

    def __enter__(self) -> Route:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._done:
            for transport in self._open:
                transport.close()
            self._end_process()

    def hand_over(self, transport: Any) -> tuple[list[Any], subprocess.Popen[bytes] | None]:
        """Leave what is open to the caller: the links, nearest hop first, and the proxy command."""
        self._done = True
        return [*self._open[: len(self._hops) - 1], transport], self._process

    def last_hop(self, algorithms: Sequence[str]) -> tuple[Any, ShownKey]:
        """Open a link up to the board's handshake; the jump hosts before it stay open between calls."""
        jumps = len(self._hops) - 1
        while len(self._open) < jumps:
            hop = self._hops[len(self._open)]
            known = read_known_hosts(hop.known_hosts)
            transport, shown = self._handshake(hop, preferred(known, hop))
            self._open.append(transport)
            check_host_key(known, shown, hop, jump=True)
            log_in(transport, hop, self._timeout_s)
        transport, shown = self._handshake(self.settings, algorithms)
        self._open = [*self._open[:jumps], transport]
        return transport, shown

    def _handshake(self, hop: SshSettings, algorithms: Sequence[str]) -> tuple[Any, ShownKey]:
        stream = self._stream(hop)
        # strict_kex and all else at their defaults; the class is how paramiko lets its packets be watched.
        transport = paramiko.Transport(stream, packetizer_class=_Packetizer)
        transport.set_log_channel(_quiet_log())
        # Paramiko's own patience is longer than ours below, which says what did not come; at the same one they would race.
        transport.banner_timeout = transport.handshake_timeout = 2 * self._timeout_s
        transport.auth_timeout = transport.channel_timeout = self._timeout_s
        transport.get_security_options().key_types = tuple(algorithms)
        done = threading.Event()
        try:
            # With an event, because start_client(timeout=...) returns as if all were well when the time is over.
            transport.start_client(event=done)
            answered = done.wait(self._timeout_s)
            error = transport.get_exception()
            if not answered:
                raise _unreachable(hop, f"no SSH handshake within {self._timeout_s:g} s")
            if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
                raise NoSuchKeyError(
                    f"{hop.address} must share an algorithm with us, found: {one_line(error)}."
                ) from error
            if error is not None or not transport.is_active():
                raise _unreachable(hop, f"the SSH handshake failed: {one_line(error or EOFError())}") from error
            key = transport.get_remote_server_key()
            return transport, ShownKey(key.get_name(), key.asbytes())
        except BaseException:
            transport.close()
            stream.close()
            raise

    def _stream(self, hop: SshSettings) -> Any:
        position = self._hops.index(hop)
        if position:
            try:
                return self._open[position - 1].open_channel(
                    "direct-tcpip", (hop.host, hop.port), ("127.0.0.1", 0), timeout=self._timeout_s
                )
            except LINK_ERRORS as error:
                through = self._hops[position - 1].address
                raise _unreachable(hop, f"the jump host {through} cannot reach it: {one_line(error)}") from error
        if hop.command:
            ours, theirs = socket.socketpair()
            self._end_process()
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {hop.command}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
            )
            theirs.close()
            return ours
        return _tcp(hop, self._timeout_s)

    def _end_process(self) -> None:
        if self._process is not None:
            end_process(self._process)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a proxy command, whether it wants to or not."""
    process.terminate()
    try:
        process.wait(_PROXY_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _unreachable(
    hop: SshSettings, reason: str, hint: str = "check that the board is on and runs sshd on that port"
) -> ConnectError:
    return ConnectError(f"{hop.address} must be reachable, found: {reason}.", hint=hint)


def _tcp(hop: SshSettings, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    addresses = _look_up(hop, timeout_s)
    failure: OSError = TimeoutError()
    for position, (family, kind, protocol, _, address) in enumerate(addresses):
        # One dead address (often IPv6) must not use up the time of the others.
        share = (deadline - time.monotonic()) / (len(addresses) - position)
        stream = socket.socket(family, kind, protocol)
        try:
            stream.settimeout(max(0.1, share))
            stream.connect(address)
        except OSError as error:
            failure = error
            stream.close()
            continue
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return stream
    if isinstance(failure, TimeoutError):
        raise _unreachable(hop, f"no answer within {timeout_s:g} s", "check the address and the network") from failure
    if isinstance(failure, ConnectionRefusedError):
        raise _unreachable(hop, "the connection is refused") from failure
    raise _unreachable(hop, failure.strerror or one_line(failure), "check the address and the network") from failure


def _look_up(hop: SshSettings, timeout_s: float) -> list[Any]:
    # In a thread, since the resolver has no timeout of its own.
    found: list[Any] = []
    failures: list[OSError] = []

    def ask() -> None:
        try:
            found.extend(socket.getaddrinfo(hop.host, hop.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            failures.append(error if isinstance(error, OSError) else OSError(str(error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if found:
        return found
    reason = f"the host name {hop.host} cannot be resolved"
    cause = failures[0] if failures else None
    detail = f" ({cause.strerror or one_line(cause)})" if cause else f" within {timeout_s:g} s"
    raise _unreachable(hop, reason + detail, "check the host name") from cause


def _quiet_log() -> str:
    """Name of the log that paramiko writes to: it logs errors with tracebacks that callers get as exceptions anyway."""
    wire = logging.getLogger("edgeprune.boards.ssh.paramiko")
    if not wire.filters:
        wire.addFilter(lambda _: logger.isEnabledFor(logging.DEBUG))
    return wire.name
