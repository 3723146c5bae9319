"""What a timing run has measured, kept on the board until the host says that it has it. Python >= 3.6, stdlib only.

A link that falls silent, or a host that dies, loses what was on its way, while the board measures on until it is told. So each
event of a run goes into a file first and to the host then; a host that comes back asks for the lines that it lacks.

Nothing waits for the disk while something is timed: the end of a process or of a link loses no line, that of the power the last ones.
"""

import contextlib
import errno
import json
import os
import time

FOLDER = "measured"
LINES = ("ready", "unusable", "sample")
"""Events that are kept; the host's journal has one record for each of them, in the same order."""
_FORGOTTEN_S = 30 * 24 * 3600.0
"""A file that nobody asked for in so long is removed."""


def main(request, emit):
    """Verb ``kept``.

    Request: ``name`` (of a run, optional), ``from`` (lines of it that the host has), ``forget`` (names of runs that the host has
    all of). Emits ``{"event": "kept", "line": event}`` for each further line. Result: ``lines``, how many those were.
    """
    root = request["root"]
    lines = []
    if request.get("name"):
        lines = read(path_of(root, request["name"]))[int(request.get("from", 0)) :]
    for line in lines:
        emit({"event": "kept", "line": line})
    forget(root, request.get("forget", ()))
    return {"lines": len(lines)}


def keeping(root, name, emit):
    """An `emit` that keeps what it tells.

    Args:
        root: The board's folder.
        name: Of the run; a new one for each.
        emit: Tells the host.
    """
    folder = os.path.join(root, FOLDER)
    os.makedirs(folder, exist_ok=True)
    _remove_old(folder)
    handle = os.open(path_of(root, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    state = {"handle": handle, "last": time.monotonic()}

    def tell(event):
        if event.get("event") in LINES and state["handle"] is not None:
            now = time.monotonic()
            line = (json.dumps(dict(event, seconds=round(now - state["last"], 4))) + "\n").encode("ascii")
            state["last"] = now
            if not _written(state["handle"], line):
                # Half a line at the end is passed over, and nothing may come behind it.
                os.close(state["handle"])
                state["handle"] = None
        emit(event)

    return tell


def _written(handle, line):
    """Write one line; False where the disk is full: that the host cannot be lost any more is no reason to stop measuring."""
    try:
        return os.write(handle, line) == len(line)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False


def read(path):
    """Whole lines of a run, oldest first; none where there is no such run."""
    try:
        with open(path, "rb") as stream:
            content = stream.read()
    except FileNotFoundError:
        return []
    found = []
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            found.append(json.loads(line.decode("ascii")))
        except ValueError:
            # What a loss of power left in the place of lines: what comes behind it cannot be told apart from it.
            break
    return found


def forget(root, names):
    """Remove what the host has all of."""
    for name in names:
        _remove(path_of(root, name))


def path_of(root, name):
    """File of one run; of a name that is none of ours, one that is not there."""
    return os.path.join(root, FOLDER, "%s.jsonl" % (name if name.isalnum() else "none"))


def _remove_old(folder):
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(".jsonl") and time.time() - os.lstat(path).st_mtime > _FORGOTTEN_S:
            _remove(path)


def _remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
