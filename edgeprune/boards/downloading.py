"""Wheels for a board, chosen and downloaded on this host by its own pip, with the index, proxy and cache that it is set to."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeprune.boards.wheels import WheelTarget, fits, version_of
from edgeprune.errors import WheelUnavailableError
from edgeprune.files import sha256_of

Progress = Callable[[str], None]
"""Called with what pip is doing."""

_TOLD = re.compile(r"\s*(Collecting|Processing|Downloading|Using cached|Saved) ")
_UNREACHABLE = re.compile(r"Retrying \(Retry\(|ConnectionError|NewConnectionError|NameResolutionError|ConnectTimeout")
_VERSIONS = re.compile(
    r"Could not find a version that satisfies the requirement (?P<wanted>.+?) \(from versions: (?P<versions>[^)]*)\)"
)

logger = logging.getLogger("edgeprune.boards.downloading")


@dataclass(frozen=True)
class Wheel:
    """One wheel on this host.

    Attributes:
        path: The file.
        name: Distribution, in lower case.
        version: Its version.
        sha256: Of the file.
        size_bytes: Of the file.
    """

    path: Path
    name: str
    version: str
    sha256: str
    size_bytes: int


def pip_arguments(requirements: Sequence[str], target: WheelTarget, folder: Path) -> list[str]:
    """Arguments of ``python -m pip`` that download `requirements` and what they need, for another machine."""
    return [
        *("download", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"),
        *("--only-binary", ":all:", "--dest", str(folder)),
        *("--python-version", target.python, "--implementation", "cp", "--abi", target.abi),
        *(word for platform in target.platforms for word in ("--platform", platform)),
        *requirements,
    ]


def download(
    requirements: Sequence[str], target: WheelTarget, folder: Path, *, progress: Progress | None = None
) -> tuple[Wheel, ...]:
    """Download the newest wheels that fit, and those that they depend on.

    pip's own settings hold (``PIP_*``, ``pip.conf``), its cache too. Which dependencies hold under a condition, such as a
    version of Python, pip judges by this host.

    Args:
        requirements: As pip takes them.
        target: What they must fit.
        folder: An empty folder, for the files.
        progress: Told what pip says.

    Raises:
        WheelUnavailableError: Nothing fits, the index cannot be reached, or this Python has no pip.
    """
    command = [sys.executable, "-m", "pip", *pip_arguments(requirements, target, folder)]
    # Both pipes in one: pip's errors are short, and its order of lines tells a reader of the log more.
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        lines = []
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                lines.append(line.rstrip())
                logger.debug("pip: %s", lines[-1])
                if progress is not None and _TOLD.match(line):
                    progress(line.strip().replace(f"{folder}/", ""))
        except BaseException:
            pip.kill()
            raise
    if pip.returncode != 0:
        raise _refusal(requirements, target, lines)
    found = tuple(_wheel(path) for path in sorted(folder.glob("*.whl")))
    strays = [wheel.path.name for wheel in found if not fits(wheel.path.name, target)]
    if strays or not found:
        raise WheelUnavailableError(
            f"every wheel must fit {target}, pip chose {strays[0] if strays else 'none'}.",
            hint="python -m pip config list, for an index of another machine",
        )
    return found


def _released(versions: str) -> list[str]:
    """The releases among the versions that pip lists."""
    return [word for word in versions.replace(" ", "").split(",") if re.fullmatch(r"\d+(\.\d+)*(\.post\d+)?", word)]


def _distribution(requirement: str) -> str:
    """Name in a requirement, as packages are compared by (PEP 503)."""
    found = re.match(r"[A-Za-z0-9._-]*[A-Za-z0-9]", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else requirement


def _wheel(path: Path) -> Wheel:
    name, version = version_of(path.name)
    return Wheel(path, name, version, sha256_of(path), path.stat().st_size)


def _refusal(requirements: Sequence[str], target: WheelTarget, lines: Sequence[str]) -> WheelUnavailableError:
    text = "\n".join(lines)
    what = " and ".join(requirements)
    if "No module named pip" in text:
        return WheelUnavailableError(
            f"this host's Python must have pip to choose wheels for a board, found none for {sys.executable}.",
            hint=f"{sys.executable} -m ensurepip --upgrade",
        )
    match = _VERSIONS.search(text)
    there = [] if match is None else _released(match["versions"])
    if _UNREACHABLE.search(text) and not there:
        return WheelUnavailableError(
            f"this host must reach a package index to choose {what} for the board, pip could not.",
            hint="python -m pip config list shows which index it asks; PIP_INDEX_URL names another",
        )
    newest, oldest = target.platforms[0], target.platforms[-2]
    looked = f"looked for {target.abi} with {newest} to {oldest}"
    if match is not None:
        named = match["wanted"].strip()
        with_one = f"versions with one: {', '.join(there[-5:])}" if there else "no version has one"
        runtime = _distribution(requirements[0])
        # The runtime's version is the user's choice; what it depends on is not.
        fitting = there if _distribution(named) == runtime else []
        if fitting:
            hint = f"--runtime-version {fitting[-1]}"
        elif there:
            hint = f"another version of {runtime}, which depends on another {_distribution(named)}: --runtime-version"
        else:
            hint = "another system or Python on the board"
        return WheelUnavailableError(
            f"a wheel of {named} must fit {target}, pip found none ({looked}; {with_one}).",
            hint=hint,
            fitting=tuple(fitting),
        )
    said = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:] or ["nothing"]
    return WheelUnavailableError(
        f"pip must find wheels of {what} for {target} ({looked}), it says: {said[-1].rstrip('.')}.",
        hint="--verbose shows all that pip said",
    )
