"""One authenticated SSH link to a board, through any jump hosts, with the host key of every hop checked.

Only links live here, not commands or files. Two things that paramiko leaves to its callers are done here: noticing that
the other end is gone, and choosing the host key algorithm that fits what is known of the host.
"""

from __future__ import annotations

import logging
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import paramiko
from paramiko.common import cMSG_GLOBAL_REQUEST

from edgeprune.boards.known_hosts import KnownHosts, host_names, read_known_hosts
from edgeprune.boards.ssh_config import SshSettings
from edgeprune.boards.ssh_login import log_in
from edgeprune.boards.ssh_route import (
    ALGORITHMS,
    LINK_ERRORS,
    NoSuchKeyError,
    Route,
    ShownKey,
    check_host_key,
    end_process,
    hops_to,
    one_line,
    preferred,
)
from edgeprune.errors import CommandError, ConnectError, HostKeyError, RemoteError

logger = logging.getLogger("edgeprune.boards.ssh")

KEEPALIVE_S = 5
SILENCE_LIMIT_S = 15


class Connection:
    """A link that is up until `close`, or until the other end is not heard for `SILENCE_LIMIT_S`.

    Attributes:
        settings: Where it leads.
        lost: Why the link was given up, empty while it is up.
    """

    def __init__(
        self, settings: SshSettings, transports: Sequence[Any], process: subprocess.Popen[bytes] | None
    ) -> None:
        self.settings = settings
        self.lost = ""
        self._transports = tuple(transports)  # nearest hop first
        self._process = process
        self._closed = threading.Event()
        for transport in self._transports:
            transport.packetizer.set_keepalive(KEEPALIVE_S, _pinger(transport))
        threading.Thread(target=self._watch, name=f"ssh watch {settings.address}", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the link is up, as far as is known."""
        return not self._closed.is_set() and all(transport.is_active() for transport in self._transports)

    @property
    def _transport(self) -> Any:
        return self._transports[-1]

    def open_session(self, timeout_s: float) -> Any:
        """A new paramiko channel for one command or subsystem.

        Raises:
            CommandError: The board refuses.
        """
        try:
            return self._transport.open_session(timeout=max(0.1, timeout_s))
        except paramiko.ChannelException as error:
            raise CommandError(
                f"{self.settings.address} must open one more session, it refuses: {error.text}.",
                hint="set MaxSessions in the board's sshd_config to 10, which is OpenSSH's default",
            ) from error

    def exit_signal(self, channel: Any) -> str | None:
        """Name without SIG of the signal that ended the command of a channel, if one did."""
        signals: dict[int, str] = self._transport.packetizer.exit_signals
        return signals.get(channel.get_id())

    def close(self, lost: str = "") -> None:
        """Close the link and all that runs over it; calls that are blocked on it return with an error."""
        self.lost = self.lost or lost
        self._closed.set()
        # Nearest hop first: closing a farther one first would send over a link that may be dead, and block.
        for transport in self._transports:
            transport.close()
        if self._process is not None:
            end_process(self._process)

    @contextmanager
    def closed_after(self, seconds: float, reason: str) -> Iterator[None]:
        """Close the link if the block takes longer: paramiko blocks without a limit while it sends into a dead link."""
        timer = threading.Timer(seconds, self.close, (reason,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close_channel(self, channel: Any, seconds: float) -> None:
        """Close a channel within a time limit; over a link that is gone there is nothing left to close."""
        with self.closed_after(seconds, "the board does not answer"), suppress(*LINK_ERRORS):
            channel.close()

    @contextmanager
    def translated(self, failed: Callable[[str], RemoteError] | None = None) -> Iterator[None]:
        """Turn paramiko's exceptions into ours.

        Args:
            failed: Makes the error from the reason, a few words; by default a ConnectError that the link was lost.
        """
        try:
            yield
        except LINK_ERRORS as error:
            reason = self.lost or one_line(error)
            if failed is not None:
                raise failed(reason) from error
            raise ConnectError(
                f"the link to {self.settings.address} must stay up, it was lost ({reason}).", hint="run it again"
            ) from error

    def _watch(self) -> None:
        silent_s = 0
        while not self._closed.wait(1.0):
            if not all(transport.is_active() for transport in self._transports):
                self.close()
            # Seconds are counted, not subtracted: a laptop that slept must first get the chance to hear.
            heard = self._transport.packetizer.heard
            self._transport.packetizer.heard = False
            silent_s = 0 if heard else silent_s + 1
            if silent_s >= SILENCE_LIMIT_S:
                logger.info("no sign of life from %s for %d s, closing the link", self.settings.address, silent_s)
                self.close(f"no sign of life for {silent_s} s")


def _pinger(transport: Any) -> Callable[[], None]:
    reference = weakref.ref(transport)

    def ping() -> None:
        # paramiko's own keepalive asks for no answer, so it cannot tell a silent board from a dead one. While keys are
        # exchanged nothing may be sent, and this runs in the thread that does the exchange, so it must not wait for it.
        target = reference()
        if target is not None and target.clear_to_send.is_set():
            message = paramiko.Message()
            message.add_byte(cMSG_GLOBAL_REQUEST)
            message.add_string("keepalive@openssh.com")
            message.add_boolean(True)
            target._send_user_message(message)

    return ping


def connect(
    settings: SshSettings, *, pinned: str | None = None, config: Path | None = None, timeout_s: float = 10.0
) -> Connection:
    """Open a link and log in.

    Args:
        settings: The board.
        pinned: Fingerprint ``SHA256:...`` that the board's key must have, instead of being in known_hosts.
        config: ssh_config file for the jump hosts.
        timeout_s: Limit for each of: reaching a hop, the handshake, logging in, seconds.

    Raises:
        ConnectError: The board or a hop cannot be reached or does not speak SSH.
        HostKeyError: A host key is unknown, has changed, or is revoked.
        AuthError: No key of the user is accepted.
    """
    with Route(hops_to(settings, config), timeout_s) as route:
        known = read_known_hosts(settings.known_hosts)
        if pinned is None:
            transport, shown = route.last_hop(preferred(known, settings))
            check_host_key(known, shown, settings)
        else:
            transport, _ = _pinned_hop(route, pinned, known)
        log_in(transport, settings, timeout_s)
        return Connection(settings, *route.hand_over(transport))


def show_host_key(
    settings: SshSettings, *, pinned: str | None = None, config: Path | None = None, timeout_s: float = 10.0
) -> ShownKey:
    """The key that a host shows, without logging in; the keys of jump hosts are checked.

    Args:
        settings: The host.
        pinned: Fingerprint ``SHA256:...`` that one of its keys must have, of whichever type; that key is the answer.
        config: ssh_config file for the jump hosts.
        timeout_s: Limit for reaching each hop, seconds.

    Raises:
        ConnectError: The host cannot be reached or does not speak SSH.
        HostKeyError: The key of a jump host is not trusted, or no key of the host is the pinned one.
    """
    with Route(hops_to(settings, config), timeout_s) as route:
        known = read_known_hosts(settings.known_hosts)
        if pinned is not None:
            return _pinned_hop(route, pinned.rstrip("="), known)[1]
        return route.last_hop(preferred(known, settings))[1]


def _pinned_hop(route: Route, pinned: str, known: KnownHosts) -> tuple[Any, ShownKey]:
    """The last hop with the host key that has the pinned fingerprint, whichever type of key that is."""
    settings = route.settings
    found: list[str] = []
    for algorithms in ALGORITHMS.values():
        try:
            transport, shown = route.last_hop(algorithms)
        except NoSuchKeyError:
            continue
        if shown.fingerprint == pinned:
            names = host_names(settings.host, settings.port, settings.host_key_alias)
            known.check_revoked(names, shown.key, settings.address)
            return transport, shown
        transport.close()
        found.append(f"{shown.key_type} {shown.fingerprint}")
    if not found:
        raise ConnectError(
            f"{settings.address} must have a host key of a usable type, found none of {', '.join(ALGORITHMS)}.",
            hint="make one on the board: ssh-keygen -A",
        )
    raise HostKeyError(
        f"the host key of {settings.address} must be the one given, {pinned}, found {', '.join(found)}: it has changed, or"
        " someone is in between.",
        hint="if the board was set up anew, compare the fingerprint with the board's own and run edgeprune device add again",
    )
