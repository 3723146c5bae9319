"""Builds of engines that outlive the host that started them: a step, its log, its exit status. Python >= 3.6, stdlib only.

A build takes minutes. It runs in a session of its own and writes its log and its exit status into files, so that a host that
comes back finds it running, or finished, instead of starting it again. What makes a step the same step is its command.
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import subprocess
import time

import store
from failures import Failure

WORK = re.compile(r"^[0-9a-f]{8,64}$")
POLL_S = 0.1
TELL_S = 1.0
TAIL_LINES = 200
TAIL_BYTES = 65536
# The exit status appears whole, and after what was written is on the disk: a reader never sees half of either.
WRAPPER = '"$@"; code=$?; sync; echo $code > "$EDGEPRUNE_STATUS.partial"; mv "$EDGEPRUNE_STATUS.partial" "$EDGEPRUNE_STATUS"'


class Step(object):
    """One run of trtexec and the files that it leaves: command, process, log, exit status.

    Args:
        folder: Where they lie.
        name: Of the step.
        words: The command.
    """

    def __init__(self, folder, name, words):
        self.folder, self.words = folder, words
        self.log = os.path.join(folder, name + ".log")
        self.status = os.path.join(folder, name + ".status")
        self.record = os.path.join(folder, name + ".json")
        self.hashes = os.path.join(folder, name + ".hashes")
        self.identity = hashlib.sha256(json.dumps(words).encode("utf-8")).hexdigest()

    def start(self, wanted):
        """Start it, unless the same command has ended well or is running.

        Returns:
            None where it was started, else "running" or "finished".
        """
        with open(os.path.join(self.folder, "lock"), "a") as lock:
            # Two hosts that come at the same time must not both start it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.before()
            if before.get("identity") == self.identity:
                if alive(before):
                    return "running"
                if self.returncode() == 0 and self.whole(wanted):
                    return "finished"
            elif alive(before):
                raise Failure(
                    "BoardBusyError",
                    "one build must run at a time in %s, found process %d with other options."
                    % (self.folder, before["pid"]),
                    "wait for it, or end it on the board: kill -- -%d" % before["pid"],
                )
            for path in [self.status, self.hashes] + [os.path.join(self.folder, name) for name in wanted]:
                if os.path.exists(path):
                    os.remove(path)
            with open(self.log, "wb") as log:
                child = subprocess.Popen(
                    ["sh", "-c", WRAPPER, "sh"] + self.words,
                    cwd=self.folder,
                    env=dict(os.environ, EDGEPRUNE_STATUS=self.status),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.child = child
            record = {"identity": self.identity, "pid": child.pid, "started": started_at(child.pid)}
            partial = self.record + ".partial"
            with open(partial, "w") as file:
                json.dump(record, file)
            os.replace(partial, self.record)
        return None

    def vouch(self, hashes):
        """Keep the hashes of what it wrote, durably."""
        partial = self.hashes + ".partial"
        with open(partial, "w") as file:
            json.dump(hashes, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.hashes)
        store.sync_folder(self.folder)

    def whole(self, wanted):
        """Whether what it wrote is there, and is what it wrote as far as somebody waited for its end."""
        paths = {name: os.path.join(self.folder, name) for name in wanted}
        if not all(os.path.isfile(path) for path in paths.values()):
            return False
        try:
            with open(self.hashes) as file:
                hashes = json.load(file)
            return all(hashes.get(name) == store.file_sha256(path) for name, path in paths.items())
        except (IOError, OSError, ValueError, AttributeError):
            # Its host had gone when it ended; its exit status appeared after all of it was on the disk.
            return not os.path.exists(self.hashes)

    def before(self):
        """What is recorded of an earlier run."""
        try:
            with open(self.record) as file:
                found = json.load(file)
        except (IOError, OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}

    def follow(self, emit):
        """Wait for its end and tell its last line now and then, which also notices a host that has gone."""
        record, told = self.before(), 0.0
        while not os.path.exists(self.status):
            child = getattr(self, "child", None)
            # A child of this process stays visible as a zombie until it is asked for.
            gone = child.poll() is not None if child is not None else not alive(record)
            if gone and not os.path.exists(self.status):
                break
            if time.time() - told >= TELL_S:
                told = time.time()
                lines = self.tail(4096).splitlines()
                emit({"event": "log", "line": lines[-1][:300] if lines else ""})
            time.sleep(POLL_S)

    def returncode(self):
        """Its exit status; -9 where it went without leaving one: the kernel or a person killed it."""
        try:
            with open(self.status) as file:
                return int(file.read())
        except (IOError, OSError, ValueError):
            return -9

    def tail(self, size=TAIL_BYTES):
        """The last lines of its log."""
        try:
            with open(self.log, "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - size))
                text = file.read().decode("utf-8", "replace")
        except (IOError, OSError):
            return ""
        return "\n".join(text.splitlines()[-TAIL_LINES:])


def alive(record):
    """Whether the process of a record runs; a number that another process has by now does not count."""
    return bool(record) and record.get("started") is not None and started_at(record["pid"]) == record["started"]


def unoccupied(root, but=None):
    """Refuse while a build runs whose host has gone: the board's lock went with that host.

    Args:
        root: The board's folder.
        but: Name of the build's folder that may run, since the caller takes it up.

    Raises:
        Failure: BoardBusyError.
    """
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "tensorrt", "*", "*.log"))):
        folder, name = os.path.split(path)
        if WORK.match(os.path.basename(folder)) is None or os.path.basename(folder) == but:
            continue
        record = Step(folder, name[: -len(".log")], []).before()
        if alive(record):
            raise Failure(
                "BoardBusyError",
                "the board must be free, but trtexec (process %d on it) goes on in %s after its host has gone."
                % (record["pid"], folder),
                "wait for it, run the compile command again to take it up, or end it on the board: kill -- -%d"
                % record["pid"],
            )


def started_at(pid):
    """When a process was started, in ticks since the machine was, or None when it is gone or a zombie."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (IOError, OSError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
