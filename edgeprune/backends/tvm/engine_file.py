"""The engine file: a shared library with a description behind it.

The file is an ELF shared object, which loaders read by the offsets in its header, followed by an uncompressed ZIP archive,
which readers find from the end of the file. So the description travels with the code, and the standard library reads it on
the host and on boards. ``strip`` would cut it off.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from edgeprune.errors import CompileError

MEMBER = "edgeprune.json"
FORMAT = 1

_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64"}  # e_machine: System V ABI, EM_X86_64 and EM_AARCH64
_EPOCH = (1980, 1, 1, 0, 0, 0)


def packed(library: bytes, description: dict[str, Any]) -> bytes:
    """An engine file; equal arguments give equal bytes."""
    text = json.dumps(
        {"format": FORMAT, **description}, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    content = io.BytesIO()
    content.write(library)
    with zipfile.ZipFile(content, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER, _EPOCH), text)
    return content.getvalue()


def description_of(engine: Path) -> dict[str, Any]:
    """What stands behind an engine's code.

    Raises:
        CompileError: It is no engine of this backend, or one of a newer edgeprune.
    """
    try:
        with zipfile.ZipFile(engine) as archive:
            found: dict[str, Any] = json.loads(archive.read(MEMBER))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CompileError(
            f"{engine.name} must be a TVM engine that edgeprune has compiled, found another file.",
            hint="edgeprune compile --backend tvm",
        ) from error
    if found.get("format") != FORMAT:
        raise CompileError(
            f"{engine.name} must be a TVM engine of format {FORMAT}, found format {found.get('format')!r}.",
            hint="compile it again with this edgeprune",
        )
    return found


def architecture_of(library: bytes) -> str:
    """Architecture in the header of a shared object, as ``uname -m`` prints it.

    Raises:
        CompileError: It is no 64-bit little-endian ELF file of a machine that TVM engines are made for.
    """
    machine = int.from_bytes(library[18:20], "little")
    if library[:6] != b"\x7fELF\x02\x01" or machine not in _MACHINES:
        raise CompileError("the linker must write an ELF library for x86_64 or aarch64, found another file.")
    return _MACHINES[machine]


def glibc_of(library: bytes) -> str:
    """Newest version of glibc that the library's symbols ask for, ``"0"`` where it asks for none.

    The names of symbol versions (``GLIBC_2.29``) stand as text in the library's dynamic string table.
    """
    versions = [tuple(map(int, match.split(b"."))) for match in re.findall(rb"\0GLIBC_(\d+(?:\.\d+)+)(?=\0)", library)]
    return ".".join(map(str, max(versions))) if versions else "0"
