"""The user's commands on the board: what tells whether a release is healthy, and what makes an application load it.

Python >= 3.6, stdlib only. A command is a line for ``sh``, run in the user's home with ``EDGEPRUNE_ROOT`` and
``EDGEPRUNE_CURRENT`` set; nothing of it is looked at but how it ends and the last that it said.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile

RELOAD_S = 20.0
"""Longest that a reload command may take once nobody waits for it but the board, seconds."""
RELOADING = "reload.lock"

_SAID_BYTES = 1000


def run(root, command, limit_s):
    """Run one command; it is killed with its children when its time is over.

    Returns:
        ``{"exit": status, or None where it was killed, "said": last of its output, "limit_s": its time}``; with ``"unstarted"``
        (why) where it could not be run at all.
    """
    try:
        return _run(root, command, limit_s)
    except OSError as error:
        # No shell, no process, no room for its output: whoever watches goes on, and knows that it is not well.
        return {"exit": None, "said": "", "limit_s": limit_s, "unstarted": str(error)}


def _run(root, command, limit_s):
    environment = dict(os.environ, EDGEPRUNE_ROOT=root, EDGEPRUNE_CURRENT=os.path.join(root, "current"))
    home = os.path.expanduser("~")
    # A file, not a pipe: an application that the command starts keeps its output open.
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=home if os.path.isdir(home) else "/",
            start_new_session=True,
        )
        try:
            status = child.wait(max(limit_s, 0.05))
        except subprocess.TimeoutExpired:
            status = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - _SAID_BYTES))
        said = " ".join(output.read().decode("utf-8", "replace").split())
    return {"exit": status, "said": said, "limit_s": limit_s}


def reload(root, command, limit_s, wanted=None):
    """Run the reload command; of two at once the later one waits, so that the last of them sees what ``current`` is then.

    Args:
        wanted: Asked when it is this command's turn; where it says no, nothing is run.

    Returns:
        As `run`, or None where it was not wanted any more.
    """
    with open(os.path.join(root, RELOADING), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if wanted is not None and not wanted():
            return None
        return run(root, command, limit_s)


def complaint(what, ended):
    """What must hold and what was found, as half a sentence."""
    if ended.get("unstarted"):
        how = "that it does not start: %s" % ended["unstarted"]
    elif ended["exit"] is None:
        how = "still running after %.0f s" % ended["limit_s"]
    elif ended["exit"] < 0:
        how = "signal %d" % -ended["exit"]
    else:
        how = "exit code %d" % ended["exit"]
    said = ": %s" % ended["said"] if ended["said"] else ""
    return "must have its %s command end with exit code 0, found %s%s" % (what, how, said)
