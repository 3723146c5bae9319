"""Removing what edgeprune left on a board: environments and leftovers, and on request everything. Python >= 3.6, stdlib only."""

import os
import sys

import builds
import environment
import hooks
import kept
import release_files
import releases
import switching
import window
from failures import Failure

ALWAYS = ("environment", "environments", "libraries.json", kept.FOLDER)
"""What a set-up, or measuring again, can bring back."""
EVERYTHING = ("current", "previous", "releases", "store", "journal.jsonl", "incoming", "runner", "tensorrt", "lock", environment.LOCK, switching.MUTEX, window.STATE, window.LOG, hooks.RELOADING)


def main(request, emit):
    """Verb ``clean``.

    Request: ``releases`` (default false: remove releases too, ``current`` with them, and the root folder itself), ``dry_run``
    (default false: only tell). Result: ``removed``: ``[{"what", "bytes"}]``, ``current`` (the release that is still there).
    """
    root, everything, dry = request["root"], bool(request.get("releases")), bool(request.get("dry_run"))
    if not os.path.isdir(root):
        return {"removed": [], "current": None}
    with releases.exclusive(root, request.get("owner")), environment.alone(root):
        builds.unoccupied(root)
        if everything and os.path.exists(os.path.join(root, "clocks.json")):
            raise Failure(
                "BoardBusyError",
                "the board's clocks must not be locked while it is cleaned, found them locked.",
                "run a measurement, which puts them back, and clean again",
            )
        leftovers = tuple(window.stale(root)) if everything else ()
        doomed = [name for name in ALWAYS + (EVERYTHING + leftovers if everything else ()) if os.path.lexists(os.path.join(root, name))]
        if not everything:
            doomed += _unneeded(root)
        # All sizes first: a file with a second name is gone with the last one only.
        links = {}
        removed = [{"what": path, "bytes": _freed(path, links)} for path in (os.path.join(root, name) for name in doomed)]
        if not dry:
            for entry in removed:
                release_files.remove(entry["what"])
            if everything and not os.listdir(root):
                os.rmdir(root)
    return {"removed": removed, "current": None if everything else releases.status(root, {})["current"]}


def _freed(path, links):
    """Bytes that are free once a file, link or folder is gone, after those before it; `links` counts names of each file."""
    paths = [path]
    if os.path.isdir(path) and not os.path.islink(path):
        paths = [os.path.join(folder, name) for folder, _, files in os.walk(path) for name in files]
    total = 0
    for found in map(os.lstat, paths):
        key = (found.st_dev, found.st_ino)
        links[key] = links.get(key, 0) + 1
        if links[key] == found.st_nlink:
            total += found.st_size
    return total


def _unneeded(root):
    """Uploads that no release is made of, runners of other versions, and builds of engines, which the store has too."""
    needed = set()
    for folder in releases.status(root, {})["releases"]:
        needed.update(release_files.hashes(os.path.join(root, "releases", folder["folder"])))
    found = []
    for name, kept in (("store", needed), ("incoming", set()), ("runner", {os.path.basename(sys.argv[0])})):
        found += [os.path.join(name, entry) for entry in _entries(root, name) if entry not in kept]
    # What each use of an engine must be told stays, and so do the timing caches: minutes of the next build.
    return found + [os.path.join("tensorrt", entry) for entry in _entries(root, "tensorrt") if builds.WORK.match(entry)]


def _entries(root, name):
    folder = os.path.join(root, name)
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
