"""From what a user calls a board to the way there: this machine, a configured name, or an address."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeprune.boards.config import BoardConfig, entry_of_url
from edgeprune.boards.cores import core_list
from edgeprune.boards.device_types import device_type, device_types
from edgeprune.boards.transport import Transport
from edgeprune.spec import DeviceSpec

LOCAL = "local"
"""The board that this machine is."""
DEFAULT_ROOT = "~/.edgeprune"
ROOT_VARIABLE = "EDGEPRUNE_ROOT"
"""Environment variable with the root folder of the board ``local``."""


@dataclass(frozen=True)
class Reached:
    """The way to a board, and what is known of it before it was asked; see `edgeprune.boards.board.Board`."""

    transport: Transport
    name: str
    python: str
    root: str
    device: DeviceSpec | None
    signers: Path | None = None
    cores: tuple[int, ...] | None = None


def reached(spec: str, config: Path | None = None) -> Reached:
    """Find the way to a board.

    Args:
        spec: See `edgeprune.boards.board.Board.open`.
        config: File with the configured boards instead of the user's.

    Raises:
        ConfigError: The address is none; `UnknownBoardError`: no board of that name is configured.
        RemoteError: The board cannot be reached, or refuses.
    """
    if spec == LOCAL:
        from edgeprune.boards.local import LocalTransport

        root = os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT
        return Reached(LocalTransport(), spec, sys.executable, root, _own_device())
    name, entry = entry_of_url(spec) if "://" in spec else (spec, BoardConfig(config).get(spec))
    device = device_type(entry.type) if entry.type is not None else None
    signers = Path(entry.signers).expanduser() if entry.signers else None
    from edgeprune.boards.ssh import SshTransport

    transport = SshTransport(
        entry.ssh,
        identity=Path(entry.identity).expanduser() if entry.identity else None,
        host_key=entry.host_key,
        jump=entry.jump,
    )
    cores = core_list(entry.cores) if entry.cores else None
    return Reached(transport, name, entry.python, entry.root, device, signers, cores)


def _own_device() -> DeviceSpec | None:
    """Device type of this machine, where there is a general one for its architecture."""
    name = {"x86_64": "x86-64-host"}.get(os.uname().machine)
    return next((spec for spec in device_types() if spec.name == name), None)
