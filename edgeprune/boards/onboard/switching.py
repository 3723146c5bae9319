"""How ``current`` moves: one rename of a link, journalled before and after. Python >= 3.6, stdlib only.

``current`` changes only by `os.replace` of a link that is already on the disk, after everything it points to is, so it names
a whole release at every instant, also after a power loss. ``previous`` follows it; the journal line written before tells a
re-run how to finish, so every verb may be killed anywhere and called again.
"""

import contextlib
import fcntl
import os
import re

import journal
import release_files

LINKS = ("current", "previous")
FOLDER = re.compile(r"[0-9a-f]{16}(-[0-9]+)?")
MUTEX = "switch.lock"


@contextlib.contextmanager
def alone(root):
    """Be the only process that moves ``current``: the one that a run asked to, or the guard of a health window.

    The board's own lock says who may; this one, held for the length of a verb, keeps two of the same run apart.
    """
    with open(os.path.join(root, MUTEX), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def switch(root, request, record):
    """Journal the intent, move ``current``, then ``previous``, then journal the end; a re-run finishes what is open."""
    journal.append(root, record)
    reached(request, "board:intent")
    _point(root, "current", record["to"], request)
    reached(request, "board:switched")
    _point(root, "previous", record["previous"])
    reached(request, "board:previous")
    journal.append(root, {"event": "done"})
    reached(request, "board:recorded")


def finish(root):
    """Complete a switch that was killed: forward when ``current`` had moved, else back to how it was."""
    record = journal.unfinished(root)
    if record is None:
        return
    if target(root, "current") == record.get("to"):
        _point(root, "previous", record.get("previous"))
        journal.append(root, {"event": "done"})
    else:
        journal.append(root, {"event": "undone"})


def target(root, name):
    """Release folder that a link points at; None where there is no link or it points nowhere."""
    try:
        path = os.readlink(os.path.join(root, name))
    except OSError:
        return None
    folder = os.path.basename(path)
    whole = path == os.path.join("releases", folder) and FOLDER.fullmatch(folder)
    return folder if whole and os.path.isdir(os.path.join(root, "releases", folder)) else None


def reached(request, state):
    """Test hook: die hard where the request says so."""
    if request.get("fault") == "after:%s" % state:
        os._exit(137)


def _point(root, name, folder, request=None):
    """Make link `name` point at a release folder (or be absent), in one step and durably."""
    link = os.path.join(root, name)
    if folder is None:
        if os.path.islink(link):
            os.unlink(link)
    else:
        fresh = os.path.join(root, ".%s-%d" % (name, os.getpid()))
        for leftover in os.listdir(root):
            if leftover.startswith(".%s-" % name):
                os.unlink(os.path.join(root, leftover))
        os.symlink(os.path.join("releases", folder), fresh)
        # A rename is atomic but not yet durable: the new link must be on the disk before, the folder's names after.
        release_files.sync(root)
        if request is not None:
            reached(request, "board:linked")
        os.replace(fresh, link)
    release_files.sync(root)
