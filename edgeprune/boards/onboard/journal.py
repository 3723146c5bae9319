"""The journal of releases: one JSON object per line, each on the disk before the next step. Python >= 3.6, stdlib only.

Events: ``activate`` and ``rollback`` (an intent: ``to``, ``from``, ``previous``), ``done`` or ``undone`` (how the intent
before it ended), ``confirmed`` (``release`` passed its health check), ``refused`` (``release`` did not pass a check),
``stuck`` (``release`` was not confirmed, and what ran before could not be put back: ``reason``), ``reloaded`` (how the user's
command ended after a rollback).

``activate`` may have ``window`` (the id of its health window), ``owner`` (who may confirm it) and ``reload`` (the user's command).
"""

import errno
import json
import os
import time

import release_files

NAME = "journal.jsonl"


def read(root):
    """All records, oldest first; a line that a power loss cut short is left out."""
    records = []
    try:
        with open(os.path.join(root, NAME), "rb") as stream:
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return records
    for line in lines:
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def switches(root):
    """Records of ``activate`` and ``rollback`` that were carried through, oldest first."""
    found, intent = [], None
    for record in read(root):
        if record.get("event") in ("activate", "rollback"):
            intent = record
        elif record.get("event") == "done" and intent is not None:
            found.append(intent)
            intent = None
        elif record.get("event") == "undone":
            intent = None
    return found


def confirmed(root):
    """Folders of the releases that passed their health check, and were not switched to anew since."""
    found = before = set()
    for line in read(root):
        if line.get("event") == "confirmed":
            found = found | {line.get("release")}
        elif line.get("event") == "activate":
            before, found = found, found - {line.get("to")}
        elif line.get("event") == "rollback":
            before = found
        elif line.get("event") == "undone":
            found = before
    return found


def unfinished(root):
    """The intent whose end is not recorded yet, or None."""
    found = None
    for record in read(root):
        if record.get("event") in ("activate", "rollback"):
            found = record
        elif record.get("event") in ("done", "undone"):
            found = None
    return found


def append(root, record):
    """Add one record, durably."""
    line = (json.dumps(dict(record, time_s=round(time.time(), 3)), sort_keys=True) + "\n").encode("utf-8")
    handle = os.open(os.path.join(root, NAME), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            # What a power loss cut short must not swallow this record.
            line = b"\n" + line
        if os.write(handle, line) < len(line):
            # A disk that has room for a part of the line takes that part without an error.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.path.join(root, NAME))
        os.fsync(handle)
    finally:
        os.close(handle)
    release_files.sync(root)
