"""Releases on the board: staged from the store, activated by one rename, put back by another. Python >= 3.6, stdlib only.

Under the board's root::

    store/<sha256>            files by content, as uploaded
    incoming/release-*        a release that is being copied; nothing ever runs from there
    releases/<folder>/        whole, verified, read-only; <folder> is the release's id, or "<id>-2" when "<id>" was damaged
    current, previous         symbolic links to releases/<folder>
    journal.jsonl             what was activated, rolled back and confirmed, synced line by line

How the links move is in `switching`, and what reverts them when the host is gone in `window` and `guard`.

Test hook: a request with ``"fault": "after:<state>"`` (see `STATES`) kills this process hard once that state is reached.
"""

import contextlib
import fcntl
import json
import os
import re
import sys
import time

import hooks
import journal
import lock
import release_files
import signature
import store
import switching
import window
from failures import Failure

LINKS = switching.LINKS
MANIFEST = release_files.MANIFEST
STATES = (
    "board:copied",
    "board:staged",
    "board:intent",
    "board:linked",
    "board:switched",
    "board:previous",
    "board:recorded",
)

OLD_S = 24 * 3600.0
"""Files that nothing needs stay so long, for a run that has just begun or is to be resumed."""

_ID = re.compile(r"[0-9a-f]{16}")


def main(request, emit):
    """Run one verb: stage, refuse, activate, rollback, confirm, gc (these take the board's lock) or status.

    Request: ``root``, ``owner`` (`lock.OWNER` of the run that may hold the lock already), and each verb's own fields.
    """
    root, verb = request["root"], request["verb"]
    writing = {
        "stage": stage,
        "refuse": refuse,
        "activate": activate,
        "rollback": rollback,
        "confirm": confirm,
        "gc": gc,
    }
    if verb == "status":
        return status(root, request)
    with exclusive(root, request.get("owner")), switching.alone(root):
        return writing[verb](root, request)


@contextlib.contextmanager
def exclusive(root, owner):
    """Hold the board's lock, unless the run on whose behalf this verb was called holds it already.

    Raises:
        Failure: BoardBusyError, naming the holder.
    """
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, "lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            try:
                holder = json.loads(file.read())
            except ValueError:
                holder = {}
            if owner is None or any(holder.get(key) != owner.get(key) for key in lock.OWNER):
                raise lock.busy(file) from None
        yield


def stage(root, request):
    """Build ``releases/<release>`` from blobs of the store.

    Request: ``release`` (16 hex digits), ``files``: ``{name: {"sha256", "size_bytes"}}`` with the manifest among them.
    Result: ``folder``, ``reused`` (it was there already, and whole).
    """
    release = request["release"]
    files = {release_files.inside(name): entry for name, entry in request["files"].items()}
    if not _ID.fullmatch(release) or not files.get(MANIFEST, {}).get("sha256", "").startswith(release):
        raise Failure("ManifestError", "a release must be named after the hash of its manifest, found %r." % release)
    incoming = os.path.join(root, "incoming")
    os.makedirs(os.path.join(root, "releases"), exist_ok=True)
    os.makedirs(incoming, exist_ok=True)
    _clear(incoming)
    folder, reused = _free_folder(root, release)
    if reused:
        signed = store.blob_path(root, files[signature.NAME]["sha256"]) if signature.NAME in files else ""
        signature.require(root, os.path.join(root, "releases", folder, MANIFEST), signed)
        _sign(root, incoming, folder, files.get(signature.NAME))
        return {"folder": folder, "reused": True}
    partial = os.path.join(incoming, "release-%s" % folder)
    os.mkdir(partial)
    try:
        for name in sorted(files):
            release_files.copy(root, files[name], partial, name)
        # Of the copies, whose hashes were checked: what is signed is what is listed, and what is listed is what is there.
        release_files.require_listed(partial, files)
        signature.require(root, os.path.join(partial, MANIFEST), os.path.join(partial, signature.NAME))
        release_files.sync_tree(partial)
        switching.reached(request, "board:copied")
        os.rename(partial, os.path.join(root, "releases", folder))
    except (OSError, Failure):
        release_files.remove(partial)
        raise
    release_files.sync(os.path.join(root, "releases"))
    switching.reached(request, "board:staged")
    return {"folder": folder, "reused": False}


def _sign(root, incoming, folder, entry):
    """Give a release that is there already the signature that it came with this time."""
    target = os.path.join(root, "releases", folder, signature.NAME)
    if entry is None or (os.path.isfile(target) and store.file_sha256(target) == entry["sha256"]):
        return
    partial = os.path.join(incoming, "release-%s" % folder)
    os.mkdir(partial)
    release_files.copy(root, entry, partial, signature.NAME)
    os.replace(os.path.join(partial, signature.NAME), target)
    release_files.sync(os.path.dirname(target))
    os.rmdir(partial)


def refuse(root, request):
    """Record that a staged release did not pass a check. Request: ``folder``, ``reason``. Result: ``refused``."""
    switching.finish(root)
    folder = _folder_name(request["folder"])
    journal.append(root, {"event": "refused", "release": folder, "reason": request.get("reason", "")})
    return {"refused": folder}


def activate(root, request):
    """Point ``current`` at a staged release; nothing happens when it is there already, and was confirmed or has no window to be.

    Request: ``folder`` (from `stage`); ``window`` (see `window`): revert unless it is confirmed in time. Result: ``current``,
    ``previous`` (folders), ``changed``, ``on_trial`` (whether that window is open now).
    """
    switching.finish(root)
    folder = _folder_name(request["folder"])
    if not os.path.isdir(os.path.join(root, "releases", folder)):
        raise Failure("DeployError", "release %s must be staged before it is activated, found no such folder." % folder)
    current = switching.target(root, "current")
    told = request.get("window")
    if current == folder and (told is None or folder in journal.confirmed(root)):
        return {"current": folder, "previous": switching.target(root, "previous"), "changed": False, "on_trial": False}
    # A repaired copy of the current release must not make the damaged one the release to go back to.
    repaired = current is not None and current[:16] == folder[:16]
    former = switching.target(root, "previous") if repaired else current
    record = {"event": "activate", "to": folder, "from": current, "previous": former}
    if told is None:
        switching.switch(root, request, record)
    else:
        record.update(window=told["id"], owner=request.get("owner"), reload=told.get("reload"))
        # The guard is there before there is something to guard: a kill at any moment finds it on its post.
        with window.guarded(root, folder, told):
            switching.switch(root, request, record)
    return {"current": folder, "previous": former, "changed": current != folder, "on_trial": told is not None}


def rollback(root, request):
    """Point ``current`` back at the release before it.

    Request: ``from`` (folder or release id that is to go; when ``current`` is another already, nothing happens), ``verify``
    (default true: rehash what is put back first), ``reason``, ``allow_none`` (default false: with no former release,
    ``current`` is removed instead of refused), ``reload`` (command that is run afterwards; by default the one that the release
    which goes was activated with). Result: ``current``, ``previous``, ``changed``, ``reload`` (None, or how that command ended).
    """
    switching.finish(root)
    current = switching.target(root, "current")
    leaving = request.get("from")
    if current is None or (leaving is not None and leaving not in (current, current[:16])):
        if leaving is None:
            raise Failure("DeployError", "the board must run a release to roll back, found none.")
        return {"current": current, "previous": switching.target(root, "previous"), "changed": False, "reload": None}
    former = switching.target(root, "previous")
    if former is None and not request.get("allow_none"):
        raise Failure(
            "DeployError",
            "the board must keep an earlier release to roll back to, found none; it still runs %s." % current[:16],
            hint="only the release before the current one can be put back; to go forward: edgeprune deploy ARTIFACT",
        )
    if former is not None and request.get("verify", True):
        damaged = release_files.damaged(os.path.join(root, "releases", former))
        if damaged:
            raise Failure(
                "InconsistentBoardError",
                "release %s must be whole to be put back, found %s damaged; the board still runs %s."
                % (former[:16], damaged[0], current[:16]),
                hint="edgeprune deploy with a good artifact",
            )
    record = {"event": "rollback", "to": former, "from": current, "previous": _before(root, former, current)}
    record["reason"] = request.get("reason", "")
    command = request.get("reload") or window.reload_of(root, current)
    switching.switch(root, request, record)
    ended = None
    if command is not None:
        ended = hooks.reload(root, command, hooks.RELOAD_S)
        journal.append(root, {"event": "reloaded", "release": former, "exit": ended["exit"], "said": ended["said"]})
    return {"current": former, "previous": record["previous"], "changed": True, "reload": ended}


def confirm(root, request):
    """Record that the current release passed its health check. Request: ``folder``. Result: ``confirmed``."""
    switching.finish(root)
    folder = _folder_name(request["folder"])
    if switching.target(root, "current") != folder:
        raise Failure(
            "DeployError",
            "release %s must be current to be confirmed, found %s." % (folder, switching.target(root, "current") or "none"),
        )
    journal.append(root, {"event": "confirmed", "release": folder, "note": request.get("note", {})})
    return {"confirmed": folder}


def status(root, request):
    """What the board holds; reads only.

    Result: ``current``, ``previous``, ``releases`` (each with its ``state``, what its manifest says of precision, backend and
    latency, ``tasks``: what parity found of each task when it was confirmed, and ``checked``: the rest that was kept then, e.g.
    the latency that was measured), ``confirmed``, ``window`` (see `window.state`).
    """
    current = switching.target(root, "current")
    notes = {line.get("release"): line.get("note", {}) for line in journal.read(root) if line.get("event") == "confirmed"}
    releases = []
    for folder in _folders(root):
        path = os.path.join(root, "releases", folder)
        contents = release_files.manifest(path)[1]
        note = dict(notes.get(folder, {}))
        releases.append(
            {
                "folder": folder,
                "state": _state(root, folder),
                "name": contents.get("name", ""),
                "created": contents.get("created", ""),
                "size_bytes": sum(entry["size_bytes"] for entry in contents.get("files", {}).values()),
                "precision": contents.get("precision", ""),
                "backend": contents.get("backend", ""),
                "predicted": contents.get("predicted") or {},
                "measured": contents.get("measured") or {},
                "tasks": note.pop("tasks", {}),
                "checked": note,
            }
        )
    return {
        "current": current,
        "previous": switching.target(root, "previous"),
        "confirmed": current in journal.confirmed(root),
        "releases": releases,
        "window": window.state(root),
    }


def gc(root, request):
    """Keep the last ``keep`` releases, and always the current and the previous one; remove the others with their blobs.

    What no kept release is made of, and nobody has asked for within `OLD_S`, goes too: engines that were timed only, uploads
    that were not finished, runners of other versions.

    Result: ``removed`` (folders), ``freed_bytes``, ``status`` (of `status`, afterwards).
    """
    switching.finish(root)
    kept = [folder for folder in (switching.target(root, name) for name in LINKS) if folder is not None]
    by_age = sorted(_folders(root), key=lambda name: _activated(root, name), reverse=True)
    for folder in by_age:
        if folder not in kept and len(kept) < max(int(request.get("keep", 3)), 1):
            kept.append(folder)
    removed = [folder for folder in by_age if folder not in kept]
    needed = set()
    for folder in kept:
        needed.update(release_files.hashes(os.path.join(root, "releases", folder)))
    incoming = os.path.join(root, "incoming")
    os.makedirs(incoming, exist_ok=True)
    freed = _clear(incoming)
    for folder in removed:
        path = os.path.join(root, "releases", folder)
        for digest in release_files.hashes(path) - needed:
            freed += release_files.remove(os.path.join(root, "store", digest))
        # Whatever is in releases/ is whole: half removed, it must not be there under its name.
        os.rename(path, os.path.join(incoming, "release-%s" % folder))
    freed += _clear(incoming)
    freed += _sweep(os.path.join(root, "store"), needed)
    freed += _sweep(incoming, ())
    freed += _sweep(os.path.join(root, "runner"), (os.path.basename(sys.argv[0]),))
    window.tidy(root)
    return {"removed": removed, "freed_bytes": freed, "status": status(root, request)}


def resolve(root, name):
    """Absolute folder of ``"current"``, ``"previous"`` or a release folder.

    Raises:
        Failure: DeployError when there is none.
    """
    folder = switching.target(root, name) if name in LINKS else _folder_name(name)
    path = None if folder is None else os.path.join(root, "releases", folder)
    if path is None or not os.path.isdir(path):
        raise Failure("DeployError", "the board must hold release %s, found none." % name)
    return os.path.join(root, name) if name in LINKS else path


def _before(root, folder, leaving):
    """What was ``previous`` when `folder` was activated last, if it is still on the board."""
    found = None
    for record in journal.switches(root):
        if record["event"] == "activate" and record["to"] == folder:
            found = record["previous"]
    exists = found is not None and os.path.isdir(os.path.join(root, "releases", found))
    return found if exists and found not in (folder, leaving) else None


def _activated(root, folder):
    """Sorts releases by when they were activated last, then by when they were staged."""
    last = -1
    for number, record in enumerate(journal.switches(root)):
        if record["to"] == folder:
            last = number
    return (last, os.stat(os.path.join(root, "releases", folder)).st_mtime)


def _state(root, folder):
    """``current``, ``previous``, ``former`` (it ran before), ``rolled back``, ``refused``, or ``incomplete``."""
    for link in LINKS:
        if switching.target(root, link) == folder:
            return link
    state = "incomplete"
    for record in journal.read(root):
        if record.get("event") == "refused" and record.get("release") == folder:
            state = "refused"
    for record in journal.switches(root):
        if folder == record["to"]:
            state = "former"
        elif folder == record["from"]:
            state = "rolled back" if record["event"] == "rollback" else "former"
    return state


def _free_folder(root, release):
    """(folder, whether it holds the whole release already): the id, or the next name after damaged ones."""
    number = 1
    while True:
        folder = release if number == 1 else "%s-%d" % (release, number)
        path = os.path.join(root, "releases", folder)
        if not os.path.isdir(path):
            return folder, False
        if not release_files.damaged(path):
            return folder, True
        number += 1


def _clear(incoming):
    """Remove what a killed `stage` left; returns its bytes. The lock is held, so nobody works there."""
    if not os.path.isdir(incoming):
        return 0
    left = [name for name in os.listdir(incoming) if name.startswith("release-")]
    return sum(release_files.remove(os.path.join(incoming, name)) for name in left)


def _sweep(folder, needed):
    """Remove the old files of a folder, but those of the names `needed`; returns their bytes."""
    freed = 0
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        try:
            if name not in needed and os.path.isfile(path) and time.time() - os.stat(path).st_mtime > OLD_S:
                freed += release_files.remove(path)
        except FileNotFoundError:
            # An upload that was renamed an instant ago.
            continue
    return freed


def _folders(root):
    path = os.path.join(root, "releases")
    return sorted(name for name in os.listdir(path) if switching.FOLDER.fullmatch(name)) if os.path.isdir(path) else []


def _folder_name(text):
    if not switching.FOLDER.fullmatch(text):
        raise Failure("DeployError", "a release must be named by its id, found %r." % text)
    return text
