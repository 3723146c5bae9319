"""Host keys that the user trusts, read from OpenSSH's known_hosts files.

Read line by line, because one line that a reader does not understand (`@cert-authority`, `@revoked`, a key type of a newer
OpenSSH, a broken line) must not hide the others. Nothing here writes: a key is never added for the user.

Source: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT", OpenSSH 9.2.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgeprune.errors import HostKeyError

logger = logging.getLogger("edgeprune.boards.known_hosts")

DEFAULT_PORT = 22


def fingerprint(key: bytes) -> str:
    """``SHA256:...`` of a public key in wire format, as ``ssh-keygen -l`` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


def host_names(host: str, port: int, alias: str | None = None) -> tuple[str, ...]:
    """Names under which a host may stand in known_hosts, the one that counts first.

    A port other than 22 is part of the name; a line without the port is good enough to trust a key, never to distrust one.
    """
    if alias:
        return (alias.lower(),)
    plain = host.lower()
    return (plain,) if port == DEFAULT_PORT else (f"[{plain}]:{port}", plain)


@dataclass(frozen=True)
class KnownHost:
    """One line of a known_hosts file.

    Attributes:
        path: The file.
        line: Line number, from 1.
        marker: ``""``, ``"@cert-authority"`` or ``"@revoked"``.
        hosts: The host field as written: patterns separated by commas, or one hashed name.
        key_type: E.g. ``"ssh-ed25519"``.
        key: Public key in wire format.
    """

    path: Path
    line: int
    marker: str
    hosts: str
    key_type: str
    key: bytes

    @property
    def location(self) -> str:
        """``file:line``."""
        return f"{self.path}:{self.line}"

    def matches(self, name: str) -> bool:
        """Whether this line speaks of the host `name` (lower case, ``[host]:port`` where the port is not 22)."""
        if self.hosts.startswith("|"):
            return _hashed_name_matches(self.hosts, name)
        found = False
        for pattern in self.hosts.lower().split(","):
            negated = pattern.startswith("!")
            if _glob(pattern[1:] if negated else pattern).fullmatch(name):
                if negated:
                    return False
                found = True
        return found


@cache
def _glob(pattern: str) -> re.Pattern[str]:
    # Only * and ? are special; fnmatch would read the brackets of [host]:port as a character class.
    return re.compile("".join({"*": ".*", "?": "."}.get(character, re.escape(character)) for character in pattern))


def _hashed_name_matches(field: str, name: str) -> bool:
    _, _, salt, expected = field.split("|")
    digest = hmac.new(base64.b64decode(salt), name.encode(), hashlib.sha1).digest()
    return hmac.compare_digest(digest, base64.b64decode(expected))


def parse_line(text: str, path: Path, line: int) -> KnownHost | None:
    """Read one line; None for blank lines and comments.

    Raises:
        ValueError: If the line is not valid; the message says why.
    """
    fields = text.split()
    if not fields or fields[0].startswith("#"):
        return None
    marker = fields.pop(0) if fields[0].startswith("@") else ""
    if marker not in ("", "@cert-authority", "@revoked"):
        raise ValueError(f"unknown marker {marker}")
    if len(fields) < 3:
        raise ValueError("it must have host names, key type and key")
    hosts, key_type, encoded = fields[:3]
    if key_type.isdigit():
        raise ValueError("keys of SSH protocol 1 are not supported")
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError("the key is not valid base64") from error
    if _embedded_type(key) != key_type:
        raise ValueError(f"the key is not a {key_type} key")
    if hosts.startswith("|"):
        _check_hashed_name(hosts)
    return KnownHost(path, line, marker, hosts, key_type, key)


def _embedded_type(key: bytes) -> str:
    length = int.from_bytes(key[:4], "big")
    return key[4 : 4 + length].decode("ascii", "replace")


def _check_hashed_name(field: str) -> None:
    parts = field.split("|")
    if len(parts) != 4 or parts[1] != "1":
        raise ValueError("the hashed host name must be |1|salt|hash")
    try:
        sizes = [len(base64.b64decode(part, validate=True)) for part in parts[2:]]
    except binascii.Error as error:
        raise ValueError("the hashed host name is not valid base64") from error
    if sizes[1] != hashlib.sha1().digest_size:
        raise ValueError("the hashed host name has the wrong length")


def read_known_hosts(paths: Iterable[Path]) -> KnownHosts:
    """Read all files that exist, in order; lines that are not valid are skipped with a warning that names file and line."""
    entries: list[KnownHost] = []
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning("%s cannot be read (%s); the host keys in it are not used.", path, error.strerror)
            continue
        # Not splitlines(): a form feed or U+2028 in a comment would shift the line numbers of the messages.
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                entry = parse_line(line, path, number)
            except ValueError as error:
                logger.warning("%s:%d skipped: %s.", path, number, error)
                continue
            if entry is not None:
                entries.append(entry)
    return KnownHosts(tuple(entries))


@dataclass(frozen=True)
class KnownHosts:
    """All lines of all files.

    Attributes:
        entries: The valid lines, in order.
    """

    entries: tuple[KnownHost, ...] = ()

    def key_types(self, names: Sequence[str]) -> tuple[str, ...]:
        """Types of the keys that are known for a host, first line first.

        A client asks for these first: the server has keys of several types, and one that is not on file looks unknown.
        """
        return tuple(dict.fromkeys(entry.key_type for name in names for entry in self._keys(name)))

    def _keys(self, name: str, marker: str = "") -> list[KnownHost]:
        return [entry for entry in self.entries if entry.marker == marker and entry.matches(name)]

    def check_revoked(self, names: Sequence[str], key: bytes, address: str) -> None:
        """Refuse a key that the user has revoked.

        Raises:
            HostKeyError: If a `@revoked` line of that host has this key.
        """
        for name in names:
            for entry in self._keys(name, "@revoked"):
                if entry.key == key:
                    raise HostKeyError(
                        f"the host key of {address} must not be a revoked one, found {fingerprint(key)}, revoked in"
                        f" {entry.location}.",
                        hint="give the board a new host key, and ask who revoked the old one",
                    )

    def check(
        self, names: Sequence[str], key_type: str, key: bytes, *, address: str, target: str, jump: bool = False
    ) -> None:
        """Accept a host's key, or say why not.

        Args:
            names: From `host_names`.
            key_type: Type of the key that the host showed.
            key: That key in wire format.
            address: How messages name the host.
            target: What the user calls the host, for the hint.
            jump: Whether it is a host on the way to a board, of which only known_hosts tells.

        Raises:
            HostKeyError: If the key is revoked, differs from the known one, or the host is not known.
        """
        self.check_revoked(names, key, address)
        known = [entry for name in names for entry in self._keys(name)]
        if any(entry.key == key for entry in known):
            return
        shown = f"{key_type} {fingerprint(key)}"
        changed = self._keys(names[0])
        if changed:
            entry = next((entry for entry in changed if entry.key_type == key_type), changed[0])
            raise HostKeyError(
                f"the host key of {address} must be the known one, {entry.key_type} {fingerprint(entry.key)} of"
                f" {entry.location}, found {shown}: it has changed, or someone is in between.",
                hint=f"if the board was set up anew, ssh-keygen -R '{names[0]}' -f {entry.path}",
            )
        authorities = [entry.location for name in names for entry in self._keys(name, "@cert-authority")]
        certified = (
            f" ({authorities[0]} trusts a certificate authority for it, but certificates of hosts cannot be checked here)"
            if authorities
            else ""
        )
        raise HostKeyError(
            f"the host key of {address} must be known, found {shown} and no entry for {names[0]}{certified}.",
            # ssh takes a port only in a whole address.
            hint=f"log in there once, ssh asks whether that is its key: ssh {'ssh://' * (':' in target)}{target}"
            if jump
            else f"compare the fingerprint with the board's own, then edgeprune device add NAME --ssh {target}"
            f" --host-key {fingerprint(key)}",
        )
