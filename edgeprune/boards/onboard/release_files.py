"""Files of a release: copied from the store while they are hashed, synced, rehashed, removed. Python >= 3.6, stdlib only."""

import hashlib
import json
import os
import re
import shutil

import signature
import store
from failures import Failure

MANIFEST = "manifest.json"

_HASH = re.compile(r"[0-9a-f]{64}")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

sync = store.sync_folder


def inside(name):
    """`name`, when it is a relative path that cannot leave its folder.

    Raises:
        Failure: ManifestError.
    """
    if not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise Failure("ManifestError", "file %r must stay inside the release's folder." % name)
    return name


def copy(root, entry, folder, name):
    """Copy one blob of the store to ``folder/name``, read-only and on the disk.

    A blob whose content is not what its name says is removed from the store, so that the next upload sends it anew.

    Raises:
        Failure: TransferError when the blob is missing or damaged.
    """
    source = store.blob_path(root, entry["sha256"])
    if os.path.islink(source) or not os.path.isfile(source):
        raise Failure(
            "TransferError", "the board's store must hold %s of the release, found none." % name, "deploy again"
        )
    target = os.path.join(folder, *name.split("/"))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    found = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        for chunk in iter(lambda: reader.read(1 << 20), b""):
            found.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    if found.hexdigest() != entry["sha256"]:
        os.unlink(source)
        raise Failure(
            "TransferError",
            "%s on the board must have sha256 %s, found %s; the damaged file was removed."
            % (name, entry["sha256"][:12], found.hexdigest()[:12]),
            "deploy again, which sends it anew",
        )
    os.chmod(target, 0o444)


def sync_tree(path):
    """Sync every folder of a tree, innermost first."""
    for folder, _, _ in os.walk(path, topdown=False):
        sync(folder)


def manifest(path):
    """(bytes, contents) of a release's manifest, or (b"", {}) when it cannot be read."""
    try:
        with open(os.path.join(path, MANIFEST), "rb") as stream:
            text = stream.read()
        contents = json.loads(text.decode("utf-8"))
        return (text, contents) if isinstance(contents.get("files"), dict) else (b"", {})
    except (OSError, ValueError, AttributeError):
        return b"", {}


def require_listed(path, files):
    """Refuse a release whose files are not just those of its manifest.

    Args:
        path: Its folder.
        files: Name to ``{"sha256"}`` of what was copied there.

    Raises:
        Failure: ManifestError.
    """
    listed = {name: entry["sha256"] for name, entry in manifest(path)[1].get("files", {}).items()}
    found = {name: entry["sha256"] for name, entry in files.items() if name not in (MANIFEST, signature.NAME)}
    wrong = sorted(name for name in set(listed) | set(found) if listed.get(name) != found.get(name))
    if wrong:
        raise Failure("ManifestError", "file %r must be the one that the manifest lists, found another." % wrong[0], "compile again")


def damaged(path):
    """Names of files of a release that are missing, altered, extra, or no plain files."""
    text, contents = manifest(path)
    if not contents or not hashlib.sha256(text).hexdigest().startswith(os.path.basename(path)[:16]):
        return [MANIFEST]
    entries = contents["files"]
    there = set()
    for folder, _, names in os.walk(path):
        there.update(os.path.relpath(os.path.join(folder, name), path) for name in names)
    bad = there - set(entries) - {MANIFEST, signature.NAME}
    bad.update(name for name in entries if _sha256(os.path.join(path, name)) != entries[name]["sha256"])
    return sorted(bad)


def hashes(path):
    """sha256 of every file of a release, its manifest included, as the manifest tells."""
    text, contents = manifest(path)
    if not contents:
        return set()
    listed = {entry["sha256"] for entry in contents["files"].values() if _HASH.fullmatch(entry["sha256"])}
    return listed | {hashlib.sha256(text).hexdigest()}


def remove(path):
    """Remove a file or a folder, if it is there; returns the bytes that it held."""
    if not os.path.isdir(path) or os.path.islink(path):
        if not os.path.lexists(path):
            return 0
        size = os.lstat(path).st_size
        os.unlink(path)
        return size
    size = 0
    for folder, _, names in os.walk(path):
        size += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
    shutil.rmtree(path)
    return size


def _sha256(path):
    if os.path.islink(path) or not os.path.isfile(path):
        return None
    return store.file_sha256(path)
