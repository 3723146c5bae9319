"""How a person writes where a board is: ``user@host:port``, or ``ssh://user@host:port?python=/path&root=/folder``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from edgeprune.errors import ConfigError

_HINT = "user@host, user@host:port, or an alias of your ssh configuration"
_OPTIONS = ("python", "root", "identity", "host_key")


@dataclass(frozen=True)
class Address:
    """One SSH server; what is None is left to the ssh configuration.

    Attributes:
        host: Name, number, or alias of the ssh configuration.
        user: Login name.
        port: TCP port.
    """

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``host``, ``user@host``, ``user@host:2222``, ``user@[2001:db8::7]:2222``.

        Raises:
            ConfigError: If it is none of these.
        """
        match = re.fullmatch(
            r"(?:(?P<user>[^@:/\s]+)@)?(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^@:/\s\[\]-][^@:/\s\[\]]*))"
            r"(?::(?P<port>[0-9]{1,5}))?",
            text.strip(),
        )
        port = int(match["port"]) if match is not None and match["port"] else None
        if match is None or (port is not None and not 0 < port < 65536):
            raise ConfigError(f"an ssh target must read user@host:port, found {text!r}.", hint=_HINT)
        return cls(match["v6"] or match["host"], match["user"], port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"{user}{host}" if self.port is None else f"{user}{host}:{self.port}"


def parse_url(url: str) -> tuple[Address, dict[str, str]]:
    """Split ``ssh://user@host:port?python=...`` into its address and its options.

    Raises:
        ConfigError: If it is no such URL, holds a password (other users of the machine could read it), or has an option
            other than ``python``, ``root``, ``identity`` and ``host_key``.
    """
    parts = urlsplit(url)
    if parts.password is not None:
        raise ConfigError(
            f"an ssh:// address must not hold a password, found one for {parts.hostname}.",
            hint="use a key: ssh-copy-id",
        )
    if parts.scheme != "ssh" or not parts.netloc or parts.path not in ("", "/") or parts.fragment:
        raise ConfigError(f"a board address must read ssh://user@host:port, found {url!r}.", hint=_HINT)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name, value in options.items():
        if name not in _OPTIONS or not value:
            raise ConfigError(
                f"an ssh:// address may have the options {', '.join(_OPTIONS)}, found {name}={value!r}.",
                hint="ssh://user@host:22?python=/usr/bin/python3",
            )
    return Address.parse(unquote(parts.netloc)), options
