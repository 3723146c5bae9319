"""Which wheels fit a board: tags from its Python, architecture and C library, as the probe tells them.

Sources: platform compatibility tags (packaging.python.org/specifications/platform-compatibility-tags), PEP 600 (manylinux by
version of glibc), PEP 656 (musllinux).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from packaging import tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from edgeprune.errors import IncompatibleTargetError
from edgeprune.spec import Fingerprint

# The oldest glibc that PEP 600's aliases name, per architecture.
_OLDEST_GLIBC = {"x86_64": 5, "i686": 5}
_OTHER_OLDEST_GLIBC = 17
_LEGACY = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}
_X86_ONLY = frozenset({"manylinux1", "manylinux2010"})
_MUSL = ("musllinux_1_2", "musllinux_1_1")
# Kernel's architecture to that of a 32-bit Python on it.
_SMALL = {"x86_64": "i686", "aarch64": "armv7l", "armv8l": "armv7l", "i386": "i686", "i586": "i686"}


@dataclass(frozen=True)
class WheelTarget:
    """What a wheel must fit.

    Attributes:
        python: Version of the board's Python, e.g. ``"3.11.2"``.
        abi: Tag of its binary interface, e.g. ``"cp311"``, ``"cp36m"``.
        platforms: Platform tags that it takes, best first.
        libc: As the board tells it, for sentences.
    """

    python: str
    abi: str
    platforms: tuple[str, ...]
    libc: str

    @property
    def architecture(self) -> str:
        """As the platform tags name it."""
        return re.sub(r"^(linux|manylinux[0-9]*(_\d+_\d+)?|musllinux_\d+_\d+)_", "", self.platforms[0])

    def __str__(self) -> str:
        return f"CPython {self.python} on {self.architecture} with {self.libc}"


def target_of(fingerprint: Fingerprint) -> WheelTarget:
    """What wheels must fit for a probed board, by the Python that was probed.

    Raises:
        IncompatibleTargetError: Its Python is not CPython, or its C library is not known.
    """
    abi = _abi(fingerprint)
    architecture = fingerprint.architecture
    if fingerprint.facts.get("python_bits") == 32:
        architecture = _SMALL.get(architecture, architecture)
    python = re.match(r"\d+(\.\d+)*", fingerprint.python)
    assert python is not None, "an ABI was told, so a version was"
    return WheelTarget(python[0], abi, _platforms(fingerprint.libc, architecture), fingerprint.libc)


def _abi(fingerprint: Fingerprint) -> str:
    """E.g. ``cp311`` of the Python whose compiled modules end in ``.cpython-311-aarch64-linux-gnu.so``."""
    told = str(fingerprint.facts.get("python_abi") or "")
    match = re.match(r"cpython-(\d+[a-z]*)", told)
    if match is None:
        raise IncompatibleTargetError(
            "a Python for which wheels are made",
            "CPython",
            told or "an implementation that does not tell its ABI",
            hint="name another Python of the board: edgeprune device add --replace --python",
        )
    return f"cp{match[1]}"


def _platforms(libc: str, architecture: str) -> tuple[str, ...]:
    name, _, version = libc.partition(" ")
    plain = f"linux_{architecture}"
    if name == "musl":
        return (*(f"{tag}_{architecture}" for tag in _MUSL), plain)
    match = re.match(r"2\.(\d+)", version)
    if name != "glibc" or match is None:
        raise IncompatibleTargetError(
            "a C library for which wheels are made",
            "glibc 2.x or musl",
            libc,
            hint="install the runtime on the board by hand, and name its Python: edgeprune device add --replace --python",
        )
    oldest, newest = _OLDEST_GLIBC.get(architecture, _OTHER_OLDEST_GLIBC), int(match[1])
    if newest < oldest:
        raise IncompatibleTargetError(
            "a C library for which wheels are made", f"glibc >= 2.{oldest}", libc, hint="a newer system on the board"
        )
    named = []
    for minor in range(newest, oldest - 1, -1):
        named.append(f"manylinux_2_{minor}_{architecture}")
        alias = _LEGACY.get(minor)
        if alias is not None and (alias not in _X86_ONLY or architecture in _OLDEST_GLIBC):
            named.append(f"{alias}_{architecture}")
    return (*named, plain)


def version_of(filename: str) -> tuple[str, str]:
    """(distribution in lower case with dashes, version) of a wheel's file name.

    Raises:
        ValueError: It is no wheel's name.
    """
    try:
        name, version, _, _ = parse_wheel_filename(filename)
    except InvalidWheelFilename as error:
        raise ValueError(f"{filename!r} is no wheel's name: {error}") from error
    return str(name), str(version)


def fits(filename: str, target: WheelTarget) -> bool:
    """Whether a wheel's tags fit: what pip is asked for, checked once more before anything is sent.

    Args:
        filename: ``name-version-python-abi-platform.whl``, each tag possibly several with dots between.
        target: What it must fit.

    Raises:
        ValueError: It is no wheel's name.
    """
    _, _, _, found = parse_wheel_filename(filename)
    match = re.match(r"cp(\d)(\d+)", target.abi)
    assert match is not None
    python = int(match[1]), int(match[2])
    taken = {
        *tags.cpython_tags(python, [target.abi], target.platforms),
        *tags.compatible_tags(python, match[0], target.platforms),
    }
    return not found.isdisjoint(taken)
