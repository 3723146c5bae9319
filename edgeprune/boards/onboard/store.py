"""The content-addressed store: ``<root>/store/<sha256>``, filled through ``<root>/incoming/``.

A blob is in the store whole, under the hash of its content, or not at all. Actions of the verb ``store``:

``missing``  {"blobs": {sha256: size}} -> {"missing": [...], "free_bytes": n, "incoming_bytes": n}; with ``untouched`` in the
             request nobody wants the blobs yet
``adopt``    {"blobs": [sha256]}       -> {}; moves a file from ``incoming/`` after hashing it
``drop``     {"blobs": [sha256]}       -> {}; removes what the host has brought for a moment, and what an upload of it left
"""

import contextlib
import hashlib
import os
import re

from failures import Failure


def blob_path(root, sha256):
    """Where a blob lies; other verbs read it there."""
    if not re.match(r"^[0-9a-f]{64}$", str(sha256)):
        raise Failure("CommandError", "a blob must be named by its sha256 in lower-case hex, found %r." % (sha256,))
    return os.path.join(root, "store", sha256)


def file_sha256(path):
    """Hash of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(path):
    """Make renames in a folder durable: a rename is atomic, but only lasts once its folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def missing(root, blobs, touch=True):
    """Which blobs must be sent; presence is told by size, which is cheap."""
    absent = []
    for sha256, size in sorted(blobs.items()):
        path = blob_path(root, sha256)
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            absent.append(sha256)
        elif touch:
            # Somebody wants it: the removal of old files goes by this time.
            with contextlib.suppress(OSError):
                os.utime(path, None)
    return {
        "missing": absent,
        "free_bytes": free_bytes(root),
        "incoming_bytes": sum(incoming_bytes(root, sha256) for sha256 in absent),
    }


def free_bytes(root):
    """Bytes that this user may still write at `root` or, before it exists, at its nearest existing parent."""
    path = root
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize


def incoming_bytes(root, sha256):
    """Bytes of a blob that an interrupted upload left behind, and that a further one need not send."""
    folder = os.path.join(root, "incoming")
    if not os.path.isdir(folder):
        return 0
    return sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder) if sha256 in name)


def adopt(root, blobs):
    """Move uploaded blobs into the store, each after its content was hashed."""
    for sha256 in blobs:
        target = blob_path(root, sha256)
        source = os.path.join(root, "incoming", sha256)
        if not os.path.isfile(source):
            # Another host that uploaded the same may have had it adopted an instant ago.
            if os.path.isfile(target) and file_sha256(target) == sha256:
                continue
            raise Failure("TransferError", "blob %s must have been uploaded, found nothing at %s." % (sha256, source))
        found = file_sha256(source)
        if found != sha256:
            os.remove(source)
            raise Failure(
                "TransferError",
                "the upload must have sha256 %s, found %s; it was removed." % (sha256, found),
                "run it again; should it fail again, check the board's storage",
            )
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.chmod(source, 0o444)
        os.replace(source, target)
        sync_folder(os.path.dirname(target))
    return {}


def drop(root, blobs):
    """Remove blobs that nothing is made of; what is not there is no trouble."""
    folder = os.path.join(root, "incoming")
    left = os.listdir(folder) if os.path.isdir(folder) else []
    for sha256 in blobs:
        paths = [blob_path(root, sha256)] + [os.path.join(folder, name) for name in left if sha256 in name]
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    return {}


def main(request, emit):
    """Verb ``store``."""
    action, root, blobs = request.get("action"), request["root"], request["blobs"]
    if action == "missing":
        return missing(root, blobs, touch=not request.get("untouched"))
    if action == "adopt":
        return adopt(root, blobs)
    if action == "drop":
        return drop(root, blobs)
    raise Failure("CommandError", "action must be one of adopt, drop, missing, found %r." % (action,))
