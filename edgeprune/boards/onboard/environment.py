"""Private Python environments on the board: built aside, tested, then switched to by one rename. Python >= 3.6, stdlib only.

Under the board's root::

    environments/<name>/      a virtual environment (PEP 405) of the Python that builds it; <name> is its id, or "<id>-2" after
                              one that does not work; ``environment.json`` tells what is in it
    environment               symbolic link to the one that is used

A folder under ``environments/`` whose name does not begin with a dot is whole. ``environment`` changes only by `os.replace` of
a link, after what it points to is on the disk; so it names a whole, tested environment or nothing, whenever a run is killed.
"""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import time

import release_files
import releases
import store
import wheel
from failures import Failure

FOLDER, LINK, RECORD, MAKER = "environments", "environment", "environment.json", "maker"
LOCK = "environment.lock"
STATES = ("board:unpacked", "board:built", "board:used")
_NAME = re.compile(r"[0-9a-f]{16}(-[0-9]+)?")
_TIMEOUT_S = 60.0


def main(request, emit):
    """Verb ``environment``: ``action`` is one of `ACTIONS`; all but ``status`` take the board's lock."""
    action = request.get("action")
    if action not in ACTIONS:
        raise Failure("CommandError", "action must be one of %s, found %r." % (", ".join(sorted(ACTIONS)), action))
    if action == "status":
        return status(request["root"], request, emit)
    with releases.exclusive(request["root"], request.get("owner")), alone(request["root"]):
        return ACTIONS[action](request["root"], request, emit)


@contextlib.contextmanager
def alone(root):
    """Be the only process that changes environments.

    The board's lock goes with the host; a build whose host is gone may still run, and must not be swept from under itself.

    Raises:
        Failure: BoardBusyError.
    """
    with open(os.path.join(root, LOCK), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(
                "BoardBusyError",
                "nobody else must change the board's environments, found a run that lost its host and still builds one.",
                "wait until it has ended, a minute or two, and run it again",
            )
        yield


def status(root, request, emit):
    """Result: ``used`` (a name or None), ``environments``: name to what its record tells, ``bytes``, and whether it is `alive`."""
    found = {}
    for name in names(root):
        path = os.path.join(root, FOLDER, name)
        found[name] = dict(record(path), bytes=size(path), alive=alive(path))
    return {"used": used(root), "environments": found}


def build(root, request, emit):
    """Build an environment from wheels of the store; it is not used yet.

    Request: ``id`` (16 hex digits), ``wheels``: ``[{"name", "sha256"}]``, ``record``: what ``environment.json`` keeps,
    ``anew``: name of an environment of that id that does not work. Result: ``name``, ``python``, ``reused``.
    """
    identity, broken = request["id"], request.get("anew")
    if not _NAME.fullmatch(identity):
        raise Failure("CommandError", "an environment must be named by 16 hex digits, found %r." % identity)
    there = [name for name in names(root) if name[:16] == identity]
    good = [name for name in there if name != broken and alive(os.path.join(root, FOLDER, name))]
    if good:
        # The one that is used has proved itself.
        good.sort(key=lambda name: name != used(root))
        return {"name": good[0], "python": python_of(root, good[0]), "reused": True}
    number = 1 + max([int(name[17:] or 1) for name in there] or [0])
    name = identity if number == 1 else "%s-%d" % (identity, number)
    _sweep(root)
    partial = os.path.join(root, FOLDER, "." + name)
    os.makedirs(partial)
    try:
        site = _skeleton(partial)
        for done, entry in enumerate(request["wheels"]):
            emit({"event": "wheel", "name": entry["name"], "done": done, "of": len(request["wheels"])})
            wheel.unpack(_blob(root, entry), entry["name"], partial, site)
        text = dict(request.get("record", {}), id=identity, created_s=round(time.time(), 3))
        with open(os.path.join(partial, RECORD), "w") as file:
            json.dump(text, file, sort_keys=True)
        _reached(request, "board:unpacked")
        # Thousands of small files: one sync of the disk instead of one each.
        os.sync()
        os.rename(partial, os.path.join(root, FOLDER, name))
    except BaseException:
        release_files.remove(partial)
        raise
    store.sync_folder(os.path.join(root, FOLDER))
    _reached(request, "board:built")
    return {"name": name, "python": python_of(root, name), "reused": False}


def use(root, request, emit):
    """Switch to an environment. The one before is kept, for programs that run from it; others go.

    Request: ``name``, ``blobs``: hashes of what it was made of, which the store need not keep. Result: ``used``, ``changed``,
    ``removed``.
    """
    name = request["name"]
    if name not in names(root):
        raise Failure("CommandError", "the board must hold environment %s, found none of that name." % name)
    before = used(root)
    if before != name:
        link(root, name)
    _reached(request, "board:used")
    _sweep(root)
    removed = [other for other in names(root) if other != name and (before == name or other != before)]
    for other in removed:
        _remove(root, other)
    for sha256 in request.get("blobs", ()):
        release_files.remove(store.blob_path(root, sha256))
    return {"used": name, "changed": before != name, "removed": removed}


def drop(root, request, emit):
    """Remove an environment that did not pass its test. Request: ``name``. Result: ``removed``."""
    name = request["name"]
    if name == used(root) or name not in names(root):
        return {"removed": None}
    _remove(root, name)
    return {"removed": name}


ACTIONS = {"status": status, "build": build, "use": use, "drop": drop}


def names(root):
    """The environments that are whole, sorted."""
    folder = os.path.join(root, FOLDER)
    return sorted(name for name in os.listdir(folder) if _NAME.fullmatch(name)) if os.path.isdir(folder) else []


def used(root):
    """Name of the environment that is used, or None."""
    try:
        name = os.path.basename(os.readlink(os.path.join(root, LINK)))
    except OSError:
        return None
    return name if name in names(root) else None


def record(path):
    """What an environment's record tells; empty where it cannot be read."""
    try:
        with open(os.path.join(path, RECORD)) as file:
            told = json.load(file)
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def own(root):
    """The record of the environment that this very process runs in, with its ``name``; None outside of one."""
    path = os.path.realpath(sys.prefix)
    if os.path.dirname(path) != os.path.realpath(os.path.join(root, FOLDER)):
        return None
    return dict(record(path), name=os.path.basename(path))


def alive(path):
    """Whether the Python that an environment was made of is still there, and is the one that asks."""
    try:
        with open(os.path.join(path, MAKER), "rb") as file:
            maker = file.read().decode("utf-8", "replace")
    except OSError:
        return False
    return maker == maker_now() and os.path.exists(os.path.join(path, "bin", "python"))


def maker_now():
    """What an environment says of the Python that made it, for the one that asks; all Pythons of a distribution share ``/usr``."""
    return "%d.%d %s" % (sys.version_info[0], sys.version_info[1], sys.prefix)


def python_of(root, name):
    """Path of an environment's Python."""
    return os.path.join(root, FOLDER, name, "bin", "python")


def size(path):
    """Bytes of the files below a folder."""
    total = 0
    for folder, _, files in os.walk(path):
        total += sum(os.lstat(os.path.join(folder, name)).st_size for name in files)
    return total


def link(root, name):
    """Point ``environment`` at one, in one step and durably."""
    fresh = os.path.join(root, ".%s-%d" % (LINK, os.getpid()))
    for leftover in os.listdir(root):
        if leftover.startswith(".%s-" % LINK):
            os.unlink(os.path.join(root, leftover))
    os.symlink(os.path.join(FOLDER, name), fresh)
    store.sync_folder(root)
    os.replace(fresh, os.path.join(root, LINK))
    store.sync_folder(root)


def _skeleton(partial):
    """An empty environment of this Python, as ``venv`` would make it; its ``site-packages``.

    `venv` itself may be missing (Debian packs it apart); what makes an environment is a small file and a link.
    """
    base = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    os.mkdir(os.path.join(partial, "bin"))
    os.mkdir(os.path.join(partial, "lib"))
    if sys.maxsize > 2**32:
        # Some systems keep compiled packages in lib64.
        os.symlink("lib", os.path.join(partial, "lib64"))
    for name in ("python", "python3"):
        os.symlink(base, os.path.join(partial, "bin", name))
    with open(os.path.join(partial, "pyvenv.cfg"), "w") as file:
        file.write("home = %s\n" % os.path.dirname(base))
        file.write("include-system-site-packages = false\nversion = %d.%d.%d\n" % sys.version_info[:3])
    # The greeting compares it: whoever names another Python for this board does not get this environment.
    with open(os.path.join(partial, MAKER), "wb") as file:
        file.write(maker_now().encode("utf-8", "replace"))
    question = "import sys, sysconfig; print(sys.prefix); print(sysconfig.get_path('platlib'))"
    answer = subprocess.run(
        [os.path.join(partial, "bin", "python"), "-c", question],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=_TIMEOUT_S,
    )
    lines = answer.stdout.decode("utf-8", "surrogateescape").splitlines()
    if len(lines) != 2 or os.path.realpath(lines[0]) != os.path.realpath(partial):
        said = answer.stderr.decode("utf-8", "replace").strip().splitlines()
        raise Failure(
            "CommandError",
            "%s must be able to run in an environment of its own, found: %s."
            % (base, said[-1].rstrip(".") if said else "it stays with %s" % "".join(lines[:1])),
            "name another Python of the board: edgeprune device add --replace --python",
        )
    site = lines[1]
    os.makedirs(site, exist_ok=True)
    return site


def _blob(root, entry):
    """A wheel in the store, its content checked; a damaged one is removed, so that the next upload sends it anew."""
    path = store.blob_path(root, entry["sha256"])
    if not os.path.isfile(path):
        raise Failure("TransferError", "the board's store must hold %s, found none." % entry["name"], "set it up again")
    found = store.file_sha256(path)
    if found != entry["sha256"]:
        os.unlink(path)
        raise Failure(
            "TransferError",
            "%s on the board must have sha256 %s, found %s; the damaged file was removed."
            % (entry["name"], entry["sha256"][:12], found[:12]),
            "set it up again, which sends it anew",
        )
    return path


def _remove(root, name):
    """Remove an environment. Whatever has its name is whole, so it loses that first."""
    doomed = os.path.join(root, FOLDER, ".gone-" + name)
    release_files.remove(doomed)
    os.rename(os.path.join(root, FOLDER, name), doomed)
    release_files.remove(doomed)


def _sweep(root):
    """Remove what killed runs left; the lock is held, so nobody works there."""
    folder = os.path.join(root, FOLDER)
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith("."):
            release_files.remove(os.path.join(folder, name))


def _reached(request, state):
    if request.get("fault") == "after:%s" % state:
        os._exit(137)
