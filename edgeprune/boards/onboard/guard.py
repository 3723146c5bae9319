"""The dead man's handle of a deployment: a process of the board's own that reverts a release which nobody confirms.

Python >= 3.6, stdlib only. It is started by `window.guarded` before ``current`` moves, in a session of its own, and holds on to
nothing of the login that started it. Its time is that of the monotonic clock: a board's date may be set off, or be put right by
the network, while it watches.
"""

import contextlib
import fcntl
import os
import select
import sys
import time

import hooks
import journal
import lock
import releases
import switching
import window
from failures import Failure

CHECK_EVERY_S = 1.0
"""From the end of one health check to the next, seconds."""
_LOOK_EVERY_S = 0.25


def main(request, emit):
    """Verb ``guard``. Request: ``folder``, ``window`` (see `window.guarded`). Ends its process itself, and has no result."""
    root, folder, told = request["root"], request["folder"], request["window"]
    path = window.lock_path(root, told["id"])
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        watch = Watch(root, folder, told)
        watch.tell()
        emit({"event": "guarding"})
        watch.await_switch()
        watch.run()
        with contextlib.suppress(OSError):
            window.forget(root, told["id"])
            os.unlink(path)
    os._exit(0)


class Watch(object):
    """One release on trial.

    Args:
        root: The board's folder.
        folder: The release.
        told: Of the window.
    """

    def __init__(self, root, folder, told):
        self.root, self.folder, self.id = root, folder, told["id"]
        self.health, self.reload, self.steady_s = told.get("health"), told.get("reload"), told.get("steady_s", 0.0)
        self.seconds = told["seconds"]
        self.end_s = time.monotonic() + self.seconds
        self.steady, self.checks, self.last, self.complaint = False, 0, None, None

    @property
    def left_s(self):
        """Seconds until the release is reverted."""
        return self.end_s - time.monotonic()

    def await_switch(self):
        """Return once the process that switches is through, or gone."""
        while self.left_s > 0:
            ready, _, _ = select.select([sys.stdin.fileno()], [], [], max(0.0, self.left_s))
            if ready and not os.read(sys.stdin.fileno(), 4096):
                return

    def run(self):
        """Watch until the window is closed by somebody, or close it."""
        self.insist(self.finish)
        if self.reload is not None and self.open:
            ended = hooks.reload(self.root, self.reload, self.left_s, lambda: self.open)
            if ended is not None and ended["exit"] != 0:
                self.revert(hooks.complaint("reload", ended))
        self.steady = self.health is None
        self.tell()
        good_since_s, next_s = None, time.monotonic()
        while self.open or self.insist(self.finish):
            now_s = time.monotonic()
            if now_s >= self.end_s:
                self.revert(self.complaint or "must be confirmed by its host within %g s, found that it was not" % self.seconds)
                continue
            if self.health is not None and now_s >= next_s:
                good_since_s = self.check(good_since_s)
                next_s = time.monotonic() + CHECK_EVERY_S
                continue
            time.sleep(max(0.0, min(_LOOK_EVERY_S, self.left_s)))

    def check(self, good_since_s):
        """Run the health command once; returns since when it has held without a break, or None."""
        begun_s = time.monotonic()
        self.last = hooks.run(self.root, self.health, self.left_s)
        self.checks += 1
        if self.last["exit"] == 0:
            since_s = begun_s if good_since_s is None else good_since_s
            self.complaint, self.steady = None, time.monotonic() - since_s >= self.steady_s
        else:
            since_s, self.complaint, self.steady = None, hooks.complaint("health", self.last), False
        self.tell()
        return since_s

    @property
    def open(self):
        """Whether the release is still on this trial."""
        record = window.opened(self.root)
        return record is not None and record["window"] == self.id

    def finish(self):
        """End a switch whose process was killed half-way; returns whether the release is on this trial then."""
        with switching.alone(self.root):
            switching.finish(self.root)
            return self.open

    def revert(self, reason):
        """Put the former release back, unless the window was closed an instant ago."""

        def work():
            with switching.alone(self.root):
                switching.finish(self.root)
                if self.open:
                    revert(self.root, window.opened(self.root), reason)

        self.insist(work)

    def insist(self, work):
        """Do something again until the disk lets it: a full one must not end the watch. None where the folder was removed."""
        while True:
            try:
                return work()
            except OSError:
                if not os.path.isdir(self.root):
                    return None
                time.sleep(CHECK_EVERY_S)

    def tell(self):
        """Write how it goes, where the disk takes it: nothing is decided by that."""
        told = {"id": self.id, "release": self.folder, "boot": window.boot(), "end_s": self.end_s, "seconds": self.seconds}
        told.update(steady=self.steady, checks=self.checks, last=self.last, complaint=self.complaint, pid=os.getpid())
        with contextlib.suppress(OSError):
            window.write(self.root, told)


def revert(root, record, reason):
    """Put back what ran before the release on trial, and have it loaded; called with `switching.alone`.

    Returns:
        The release that runs then, or None.
    """
    # What ran before its trial already is better than nothing.
    none = record.get("from") != record["to"]
    request = {"from": record["to"], "reason": reason, "allow_none": none, "reload": record.get("reload")}
    try:
        return releases.rollback(root, request)["current"]
    except Failure as failure:
        journal.append(root, {"event": "stuck", "release": record["to"], "reason": "%s; %s" % (reason, failure.message)})
        return record["to"]


def settle(root, owner, emit):
    """End a trial whose host is gone: called by whoever takes the board's lock, which that host held as long as it lived."""
    with switching.alone(root):
        switching.finish(root)
        record = window.opened(root)
        if record is None or _same(record.get("owner"), owner):
            return
        emit({"event": "settling", "release": record["to"]})
        current = revert(root, record, "must be confirmed by its host, found that the host is gone")
    emit({"event": "settled", "release": record["to"], "current": current})


def _same(one, other):
    return one is not None and all(one.get(key) == other.get(key) for key in lock.OWNER)
