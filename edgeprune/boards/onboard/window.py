"""Health windows: a release that was switched to is on trial until its host confirms it. Python >= 3.6, stdlib only.

A window is open from the journal's ``activate`` that names it until ``confirmed``, until the release goes, or until ``stuck``.
As long as it is open a detached process, `guard`, watches, and puts the former release back when its time is over; that
process depends neither on the host, nor on the link, nor on the board's clock. Where it dies too (a kill, a power loss), the
next run that takes the board's lock puts the former release back (`guard.settle`).

``window.json`` says for people and for the host how the trial goes. Nothing is decided by it.
"""

import contextlib
import fcntl
import glob
import json
import os
import subprocess
import sys
import time

import journal
import switching
from failures import Failure

STATE = "window.json"
LOG = "guard.log"
_LOCK = "guard-%s.lock"


def main(request, emit):
    """Verb ``window``: reads only. Request: ``id``, ``folder``.

    Result: ``open`` (whether that window is), ``current``, ``state`` (of `state`, while it is open), ``reason`` (why the release
    was reverted, where it was).
    """
    root = request["root"]
    record = opened(root)
    reason = None
    for line in journal.read(root):
        if line.get("event") == "activate" and line.get("window") == request["id"]:
            reason = None
        elif line.get("event") == "rollback" and line.get("from") == request["folder"]:
            reason = line.get("reason")
        elif line.get("event") == "stuck" and line.get("release") == request["folder"]:
            reason = line.get("reason")
    mine = record is not None and record["window"] == request["id"]
    return {
        "open": mine,
        "current": switching.target(root, "current"),
        "state": state(root) if mine else None,
        "reason": reason,
    }


def opened(root):
    """The journal's record of the activation whose window is open, or None."""
    found = before = None
    for line in journal.read(root):
        event = line.get("event")
        if event in ("activate", "rollback"):
            before = found
            found = line if event == "activate" and line.get("window") else None
        elif event == "undone":
            found = before
        elif event in ("confirmed", "stuck") and found is not None and line.get("release") == found["to"]:
            found = None
    return found if found is not None and switching.target(root, "current") == found["to"] else None


def state(root):
    """How the trial goes that is on, or None.

    Keys: ``release``, ``guarded`` (whether the guard lives), ``left_s`` (None without it), ``seconds``, ``steady`` (whether the
    health command has held for as long as was asked), ``checks`` (times it was run), ``last`` (how it ended, see `hooks.run`),
    ``complaint`` (what is wrong, or None).
    """
    record = opened(root)
    if record is None:
        return None
    told = read(root, record["window"])
    alive = guarding(root, record["window"])
    same_boot = told.get("boot") == boot()
    return {
        "release": record["to"],
        "guarded": alive,
        "left_s": round(max(0.0, told["end_s"] - time.monotonic()), 1) if alive and same_boot and "end_s" in told else None,
        "seconds": told.get("seconds"),
        "steady": bool(told.get("steady")),
        "checks": told.get("checks", 0),
        "last": told.get("last"),
        "complaint": told.get("complaint"),
    }


def read(root, name):
    """What the guard of a window wrote last, or {}."""
    try:
        with open(os.path.join(root, STATE), "rb") as stream:
            told = json.loads(stream.read().decode("utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) and told.get("id") == name else {}


def write(root, told):
    """Replace ``window.json``; it need not survive a power loss."""
    fresh = os.path.join(root, ".%s-%d" % (STATE, os.getpid()))
    with open(fresh, "w") as stream:
        json.dump(told, stream)
    os.replace(fresh, os.path.join(root, STATE))


def forget(root, name):
    """Remove ``window.json`` where it is of this window."""
    if read(root, name):
        os.unlink(os.path.join(root, STATE))


def boot():
    """Which start of the machine this is: monotonic times of another one mean nothing."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def lock_path(root, name):
    """The file that the guard of a window holds locked as long as it lives."""
    return os.path.join(root, _LOCK % name)


def guarding(root, name):
    """Whether the guard of a window lives."""
    try:
        with open(lock_path(root, name)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextlib.contextmanager
def guarded(root, folder, told):
    """Have a guard on its post while a release is switched to; it begins its watch when the block, or this process, ends.

    Args:
        folder: The release.
        told: ``id``, ``seconds`` (until when it must be confirmed), ``steady_s`` (how long health must hold), ``health`` and
            ``reload`` (commands, or None).

    Raises:
        Failure: CommandError when the guard does not start; nothing was switched.
    """
    request = {"root": root, "folder": folder, "window": told}
    with open(os.path.join(root, LOG), "wb") as log:
        child = subprocess.Popen(
            [sys.executable, os.path.abspath(sys.argv[0]), "guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            # Out of the login's session and process group: neither its end nor its signals reach the guard.
            start_new_session=True,
        )
    try:
        child.stdin.write(json.dumps(request).encode("ascii") + b"\n")
        child.stdin.flush()
        ready = child.stdout.readline()
    except OSError:
        ready = b""
    if b'"guarding"' not in ready:
        child.kill()
        child.wait()
        raise Failure(
            "CommandError",
            "the board must run a guard for the release's first seconds, found that it does not start (%s)." % _last_line(root),
            "look at %s on the board" % os.path.join(root, LOG),
        )
    child.stdout.close()
    try:
        yield
    finally:
        child.stdin.close()


def reload_of(root, folder):
    """The reload command that a release was activated with last, or None."""
    found = None
    for record in journal.switches(root):
        if record["event"] == "activate" and record["to"] == folder:
            found = record.get("reload")
    return found


def stale(root):
    """Names of the lock files of guards that were killed."""
    locks = [os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(root), _LOCK % "*"))]
    return [name for name in locks if not guarding(root, name[len("guard-") : -len(".lock")])]


def tidy(root):
    """Remove what guards that were killed left behind."""
    for name in stale(root):
        os.unlink(os.path.join(root, name))
    if opened(root) is None and os.path.exists(os.path.join(root, STATE)):
        os.unlink(os.path.join(root, STATE))


def _last_line(root):
    try:
        with open(os.path.join(root, LOG), "rb") as stream:
            lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it said nothing"
