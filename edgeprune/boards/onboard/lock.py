"""Exclusive use of the board: a lock that a live process owns, never a bare file.

The kernel drops a ``flock`` when its process dies, however it dies, so a file that is left behind blocks nobody. The
process waits for the end of its standard input, which comes when the host lets go, when the host dies, and when the link
is lost.
"""

import datetime
import fcntl
import json
import os
import select
import sys

import builds
from failures import Failure

# A line now and then makes the kernel notice a peer that vanished without a word: with nothing to send, a dead TCP
# connection looks like a quiet one for hours.
HEARTBEAT_S = 15.0
OWNER = ("host", "pid", "run")
"""What tells one holder from another. A process's number is given out again, also by another container of the same name, and
one process may hold a board twice: ``run`` is another one each time."""


def main(request, emit):
    """Verb ``lock``: request {"purpose", "user", "host", "pid", "run", "build"}; emits {"event": "held"} once the lock is held.

    ``build`` names the TensorRT build that the holder takes up where it still runs; any other one keeps the board busy.
    """
    os.makedirs(request["root"], exist_ok=True)
    path = os.path.join(request["root"], "lock")
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy(file)
        builds.unoccupied(request["root"], but=request.get("build"))
        # Only here: `clocks` waits for the end of input as this verb does, and `guard` knows of releases, which know of locks.
        import clocks
        import guard

        guard.settle(request["root"], {key: request.get(key) for key in OWNER}, emit)
        restored = clocks.restore_leftover(request["root"])
        if restored is not None:
            emit({"event": "leftover", "restored": restored})
        holder = {
            "purpose": request.get("purpose", ""),
            "user": request.get("user", ""),
            "host": request.get("host", ""),
            "pid": request.get("pid"),
            "run": request.get("run"),
            "board_pid": os.getpid(),
            "since": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        }
        file.seek(0)
        file.truncate()
        json.dump(holder, file)
        file.flush()
        emit({"event": "held", "holder": holder})
        wait_for_end_of_input(emit)
        file.seek(0)
        file.truncate()
    return {"released": True}


def wait_for_end_of_input(emit):
    """Return when the host has closed this process's standard input."""
    descriptor = sys.stdin.fileno()
    while True:
        ready, _, _ = select.select([descriptor], [], [], HEARTBEAT_S)
        if not ready:
            emit({"event": "alive"})
        elif not os.read(descriptor, 4096):
            return


def busy(file):
    """The failure that names the holder, as far as the lock file tells."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        who = "%(user)s on %(host)s (process %(pid)s, %(purpose)s) has held it since %(since)s" % holder
    except (ValueError, KeyError, TypeError):
        # Taken in the instant between the lock and the writing of the name.
        who = "another run has just taken it"
    return Failure(
        "BoardBusyError",
        "the board must be free, but %s." % who,
        "wait until that run has ended, or stop it; the lock goes with its process",
    )
