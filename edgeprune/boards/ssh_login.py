"""Logging in over SSH with the user's keys: those of the agent, then those in files. Passwords are never asked for."""

from __future__ import annotations

import base64
import binascii
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paramiko
from paramiko.agent import AgentSSH

from edgeprune.boards.ssh_config import SshSettings
from edgeprune.errors import AuthError, ConnectError

logger = logging.getLogger("edgeprune.boards.ssh")

_AGENT_TIMEOUT_S = 30.0  # a hardware key waits for a finger


@dataclass
class _Attempts:
    """What was tried, for the message."""

    tried: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    locked: list[Path] = field(default_factory=list)

    def text(self) -> str:
        tried = ", ".join(self.tried) or "none to try"
        return f"{tried}; not usable: {', '.join(self.unusable)}" if self.unusable else tried


def log_in(transport: Any, settings: SshSettings, timeout_s: float) -> None:
    """Authenticate a link whose host key was checked.

    Args:
        transport: paramiko transport after the handshake.
        settings: Who and with what.
        timeout_s: Limit for the answer to one key, seconds.

    Raises:
        AuthError: No key is accepted.
        ConnectError: The board stopped answering.
    """
    attempts = _Attempts()
    with _Agent(settings.agent) as agent:
        for label, key in _keys(settings, agent, attempts):
            attempts.tried.append(label)
            try:
                transport.auth_publickey(settings.user, key)
            except paramiko.BadAuthenticationType as error:
                accepted = ", ".join(error.allowed_types)
                raise AuthError(
                    f"{settings.address} must accept keys, it accepts only {accepted}.",
                    hint="set PubkeyAuthentication yes in the board's sshd_config",
                ) from error
            except paramiko.AuthenticationException as error:
                # A timeout comes as the same type as a refusal; only the text differs.
                if "timeout" in str(error).lower():
                    raise ConnectError(
                        f"{settings.address} must answer a login within {timeout_s:g} s, it did not.",
                        hint="run it again",
                    ) from error
                logger.debug("%s does not accept %s", settings.address, label)
            except (paramiko.SSHException, EOFError, OSError) as error:
                if transport.is_active():
                    attempts.unusable.append(f"{attempts.tried.pop()} ({' '.join(str(error).split())})")
                    continue
                raise _too_many(settings, attempts) from error
            if transport.is_authenticated():
                return
            if not transport.is_active():
                raise _too_many(settings, attempts)
    locked = f"ssh-add {attempts.locked[0]}" if attempts.locked else None
    port = "" if settings.port == 22 else f" -p {settings.port}"
    raise AuthError(
        f"{settings.address} must accept one of your keys, found: {attempts.text()}.",
        hint=locked or f"ssh-copy-id{port} {settings.user}@{settings.host}",
    )


def _too_many(settings: SshSettings, attempts: _Attempts) -> AuthError:
    return AuthError(
        f"{settings.address} must accept one of your keys, it closed the connection after: {attempts.text()}.",
        hint="name the right key: IdentityFile and IdentitiesOnly yes in ~/.ssh/config",
    )


def _keys(settings: SshSettings, agent: _Agent, attempts: _Attempts) -> Iterator[tuple[str, Any]]:
    """Keys in OpenSSH's order: named ones that the agent holds, the agent's others, files."""
    held = {key.asbytes(): key for key in agent.keys}
    used: set[bytes] = set()
    for path in settings.identities:
        public = _public_part(path)
        if public in held:
            used.add(public)
            yield f"{path} (agent)", held[public]
    if not settings.only_identities:
        for public, key in held.items():
            if public not in used:
                used.add(public)
                yield f"agent key {key.fingerprint}", key
    for path in settings.identities:
        loaded = None if _public_part(path) in used else _load(path, attempts)
        if loaded is not None and loaded.asbytes() not in used:
            yield str(path), loaded


def _public_part(path: Path) -> bytes:
    name = path if path.suffix == ".pub" else path.with_name(path.name + ".pub")
    try:
        return base64.b64decode(name.read_text().split()[1])
    except (OSError, IndexError, ValueError, binascii.Error):
        return b""


def _load(path: Path, attempts: _Attempts) -> Any:
    try:
        return paramiko.PKey.from_path(path)
    except FileNotFoundError:
        return None
    except (TypeError, paramiko.PasswordRequiredException):
        # cryptography says TypeError when a key is encrypted and no password was given.
        attempts.locked.append(path)
        attempts.unusable.append(f"{path} (needs a passphrase)")
    except OSError as error:
        attempts.unusable.append(f"{path} ({error.strerror})")
    except (ValueError, paramiko.SSHException, paramiko.UnknownKeyType):
        attempts.unusable.append(f"{path} (not a private key that can be read here)")
    return None


class _Agent:
    """The user's ssh agent, with a time limit that paramiko's own lacks; without an agent there are no keys."""

    def __init__(self, path: str | None) -> None:
        self._agent = AgentSSH()
        self._stream: socket.socket | None = None
        if not path:
            return
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(_AGENT_TIMEOUT_S)
        try:
            stream.connect(path)
            self._agent._connect(stream)
        except (OSError, paramiko.SSHException) as error:
            stream.close()
            logger.warning("the ssh agent at %s does not answer (%s); its keys are not used.", path, error)
            return
        self._stream = stream

    @property
    def keys(self) -> tuple[Any, ...]:
        return tuple(self._agent.get_keys())

    def __enter__(self) -> _Agent:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
