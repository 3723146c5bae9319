"""An artifact: a folder with an engine, golden data and a manifest, verified whenever it is opened."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.deployment.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest
from edgeprune.errors import ConfigError, ManifestError
from edgeprune.files import sha256_of

GOLDEN_NAME = "golden.npz"
MODEL_NAME = "model.json"
INFER_NAME = "infer.py"

_log = logging.getLogger("edgeprune.deployment.artifact")


@dataclass(frozen=True)
class Artifact:
    """A compiled model that is ready to be deployed.

    Attributes:
        folder: Where its files are.
        manifest: Its manifest.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: str | Path) -> Artifact:
        """Open an artifact and verify every file.

        Raises:
            ManifestError: A file is missing, extra, altered, or not a plain file; or the manifest is not valid.
        """
        folder = Path(folder)
        text = _read_manifest(folder)
        manifest = Manifest.parse(text, str(folder / MANIFEST_NAME))
        found = _plain_files(folder)
        expected = {MANIFEST_NAME, *manifest.files}
        for name in sorted(expected - found):
            raise ManifestError(f"artifact {folder} must hold {name!r}, which is missing.", hint="compile it again")
        for name in sorted(found - expected - {SIGNATURE_NAME}):
            raise ManifestError(f"artifact {folder} must hold the files of its manifest only, found {name!r}.")
        for name, entry in sorted(manifest.files.items()):
            actual = describe_file(folder / name)
            if actual != entry:
                raise ManifestError(
                    f"{name!r} of artifact {folder} must have sha256 {entry.sha256[:12]} ({entry.size_bytes} bytes), "
                    f"found {actual.sha256[:12]} ({actual.size_bytes} bytes).",
                    hint="compile it again",
                )
        return cls(folder, manifest)

    @property
    def id(self) -> str:
        """sha256 of the canonical manifest, hexadecimal."""
        return self.manifest.id

    @property
    def release(self) -> str:
        """Name of its release on a board: the first 16 digits of `id`."""
        return self.id[:16]

    @property
    def engine(self) -> Path:
        """The engine file."""
        return self.folder / self.manifest.engine

    @property
    def golden(self) -> Path:
        """Golden inputs and outputs."""
        return self.folder / GOLDEN_NAME

    @property
    def model(self) -> dict[str, Any]:
        """Contents of ``model.json``: names, shapes, dtypes, normalization, labels."""
        contents: dict[str, Any] = json.loads((self.folder / MODEL_NAME).read_bytes())
        return contents

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, the manifest included."""
        return len(self.manifest.canonical()) + sum(entry.size_bytes for entry in self.manifest.files.values())


def describe_file(path: Path) -> FileEntry:
    """Hash and size of a file."""
    return FileEntry(sha256=sha256_of(path), size_bytes=path.stat().st_size)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends well, and vanishes when it does not.

    Files and folders are synced before the rename, so that after a power loss `out` is the old artifact, the new one, or
    absent; never a mixture.

    Raises:
        ConfigError: `out` exists and is no artifact.
    """
    _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _sync_tree(partial)
        _check_replaceable(out)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise ManifestError(f"an artifact must be a folder, found none at {folder}.", hint="edgeprune compile")
    if path.is_symlink():
        raise ManifestError(f"{MANIFEST_NAME!r} of artifact {folder} must be a plain file, found a symbolic link.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ManifestError(
            f"artifact {folder} must hold a readable {MANIFEST_NAME!r}, found none ({error.strerror}).",
            hint=next((str(one.parent) for one in sorted(folder.glob(f"*/{MANIFEST_NAME}"))), "edgeprune compile"),
        ) from error


def _plain_files(folder: Path, prefix: str = "") -> set[str]:
    """Names of all files below a folder; nothing else may be there."""
    names: set[str] = set()
    for entry in os.scandir(folder):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISREG(mode):
            names.add(prefix + entry.name)
        elif stat.S_ISDIR(mode):
            inner = _plain_files(Path(entry.path), f"{prefix}{entry.name}/")
            names.update(inner or {f"{prefix}{entry.name}/"})
        else:
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "a special file"
            raise ManifestError(f"{prefix + entry.name!r} of an artifact must be a plain file, found {kind}.")
    return names


def _check_replaceable(out: Path) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not out.is_symlink():
        if not any(out.iterdir()):
            return
        try:
            Manifest.parse(_read_manifest(out), str(out / MANIFEST_NAME))
        except ManifestError as error:
            raise ConfigError(
                f"{out} must be new, empty or an artifact to be replaced, found a folder with other files.",
                hint="another --out",
            ) from error
        return
    raise ConfigError(f"{out} must be new or a folder, found something else.", hint="another --out")


def _remove_stale(out: Path) -> None:
    """Remove what a killed process left beside `out`; put back an artifact that it had moved aside."""
    pattern = re.compile(re.escape(f".{out.name}.") + r"(\d+)\.(partial|old)")
    for path in out.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or _alive(int(match[1])):
            continue
        if match[2] == "old" and not out.exists():
            path.rename(out)
            continue
        _log.info("removed %s, left by a process that was killed", path)
        shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    try:
        if out.exists():
            out.rename(old)
        partial.rename(out)
        sync(out.parent)
    finally:
        if old.exists():
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(out)
