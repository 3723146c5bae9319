"""The on-board runner as one file: the folder ``onboard/`` zipped in memory, the same bytes for the same source."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib import resources

_LEFT_OUT = "__init__.py"


@dataclass(frozen=True)
class RunnerPackage:
    """What is uploaded to a board once.

    Attributes:
        name: File name, which holds the hash of the content.
        content: A zip archive that ``python3 FILE verb`` runs.
    """

    name: str
    content: bytes


@cache
def runner_package() -> RunnerPackage:
    """Zip the runner.

    Files are sorted, stored without compression and dated to the epoch of the format, so that nothing but their content
    changes the hash: not the machine, its clock, its zlib, or the order of its folders.
    """
    folder = resources.files("edgeprune.boards.onboard")
    sources = sorted(
        (entry.name, entry.read_bytes())
        for entry in folder.iterdir()
        if entry.name.endswith(".py") and entry.name != _LEFT_OUT
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sources:
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content)
    content = buffer.getvalue()
    return RunnerPackage(f"runner-{hashlib.sha256(content).hexdigest()}.pyz", content)
