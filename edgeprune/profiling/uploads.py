"""Bring engines to a board: large ones as single files, small ones (hundreds of kernels) together as one zip."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.files import sha256_of

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

Entry = dict[str, Any]

SMALL_BYTES = 1 << 20
"""Engines up to this size travel together: each upload of its own costs a few round trips."""


def content_hash(engine: bytes | Path) -> str:
    """SHA-256 of an engine file or its bytes."""
    return hashlib.sha256(engine).hexdigest() if isinstance(engine, bytes) else sha256_of(engine)


def spilled(engine: bytes, path: Path) -> bytes | Path:
    """A large engine as a file, a small one as it is: a run has dozens of them at once."""
    if len(engine) <= SMALL_BYTES:
        return engine
    path.write_bytes(engine)
    return path


def upload(board: Board, engines: Mapping[str, bytes | Path], kernels: Collection[str]) -> dict[str, Entry]:
    """Push engines; what the board already has is skipped.

    Args:
        board: Where to.
        engines: Id to engine.
        kernels: Ids of engines that hold one kernel as the runtime would write it: they must not be optimized again.

    Returns:
        Id to the engine's entry of a ``bench`` request.
    """
    entries: dict[str, Entry] = {}
    small: dict[str, bytes] = {}
    for name, engine in engines.items():
        entries[name] = {"kind": "kernel" if name in kernels else "network"}
        if (len(engine) if isinstance(engine, bytes) else engine.stat().st_size) <= SMALL_BYTES:
            small[name] = engine if isinstance(engine, bytes) else engine.read_bytes()
        else:
            entries[name]["blob"] = board.push(engine)
    if small:
        blob = board.push(bundle(small.values()))
        for name, content in small.items():
            entries[name].update(blob=blob, member=content_hash(content))
    return entries


def bundle(contents: Collection[bytes]) -> bytes:
    """A zip of files named by their hash; equal contents give equal bytes."""
    by_hash = {content_hash(content): content for content in contents}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(by_hash):
            # Fixed date and system: the defaults are the time of day and the host, which would change the bundle's hash.
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            archive.writestr(entry, by_hash[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
