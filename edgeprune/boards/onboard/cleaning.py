"""Removing what edgeprune left on a board: environments and leftovers, and on request everything. Python >= 3.6, stdlib only."""

import os
import sys

import environment
import release_files
import releases
from failures import Failure

ALWAYS = ("environment", "environments", "libraries.json")
"""What a setup can bring back."""
EVERYTHING = ("current", "previous", "releases", "store", "journal.jsonl", "incoming", "runner", "lock", environment.LOCK)


def main(request, emit):
    """Verb ``clean``.

    Request: ``releases`` (default false: remove releases too, ``current`` with them, and the root folder itself), ``dry_run``
    (default false: only tell). Result: ``removed``: ``[{"what", "bytes"}]``, ``current`` (the release that is still there).
    """
    root, everything, dry = request["root"], bool(request.get("releases")), bool(request.get("dry_run"))
    if not os.path.isdir(root):
        return {"removed": [], "current": None}
    with releases.exclusive(root, request.get("owner")), environment.alone(root):
        if everything and os.path.exists(os.path.join(root, "clocks.json")):
            raise Failure(
                "BoardBusyError",
                "the board's clocks must not be locked while it is cleaned, found them locked.",
                "run a measurement, which puts them back, and clean again",
            )
        removed = [_gone(root, name, dry) for name in ALWAYS]
        if everything:
            removed += [_gone(root, name, dry) for name in EVERYTHING]
            if not dry and not os.listdir(root):
                os.rmdir(root)
        else:
            removed += _unneeded(root, dry)
    current = None if everything else releases.status(root, {})["current"]
    return {"removed": [entry for entry in removed if entry is not None], "current": current}


def _gone(root, name, dry):
    """Remove one file, link or folder; what it was, or None where there is nothing."""
    path = os.path.join(root, name)
    if not os.path.lexists(path):
        return None
    if dry:
        size = environment.size(path) if os.path.isdir(path) and not os.path.islink(path) else os.lstat(path).st_size
    else:
        size = release_files.remove(path)
    return {"what": path, "bytes": size}


def _unneeded(root, dry):
    """Uploads that no release is made of, and runners of other versions."""
    needed = set()
    for folder in releases.status(root, {})["releases"]:
        needed.update(release_files.hashes(os.path.join(root, "releases", folder["folder"])))
    kept = {"store": needed, "incoming": set(), "runner": {os.path.basename(sys.argv[0])}}
    found = []
    for name in ("store", "incoming", "runner"):
        folder = os.path.join(root, name)
        for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if entry not in kept[name]:
                found.append(_gone(root, os.path.join(name, entry), dry))
    return found
