"""NVIDIA's trtexec on the board: where it is, which TensorRT it belongs to, and runs of it that outlive a lost link.

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
import trtpython
from failures import Failure

# TensorRT's packages install it where no shell looks.
OUTSIDE_PATH = "/usr/src/tensorrt/bin/trtexec"
BANNER = re.compile(r"\[TensorRT v(\d+)\]")
LIBRARY_FOLDERS = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/local/tensorrt/lib", "/usr/local/TensorRT*/lib")
WORK = re.compile(r"^[0-9a-f]{8,64}$")
ANSWER_S = 60.0
POLL_S = 0.1
TELL_S = 1.0
TAIL_LINES = 200
TAIL_BYTES = 65536
# The exit status appears whole, and after what was written is on the disk: a reader never sees half of either.
WRAPPER = '"$@"; code=$?; sync; echo $code > "$EDGEPRUNE_STATUS.partial"; mv "$EDGEPRUNE_STATUS.partial" "$EDGEPRUNE_STATUS"'


def main(request, emit):
    """Verb ``trtexec``.

    Actions:
        ``find``: {} -> {"program" (words), "version_tag" (text of digits), "banner"}
        ``run``: {"work": name of a folder, "step": name, "arguments": [...], "outputs": [file names in the folder],
            "keep": [those that the store takes too], "engine_arguments": [what each use of a kept engine must be told]}
            -> {"returncode", "log", "log_path", "seconds", "by", "found" (None,
            "running" or "finished"), "outputs": {name: {"sha256", "size"}}}; ``{work}``, ``{store}`` and ``{root}`` in
            arguments stand for folders. Emits {"event": "log", "line"}.
        ``forget``: {"work", "step"} -> {}; the next run starts that step anew
    """
    action = request.get("action")
    if action not in ACTIONS:
        raise Failure("CommandError", "action must be one of %s, found %r." % (", ".join(sorted(ACTIONS)), action))
    return ACTIONS[action](request, emit)


def locate():
    """Path of trtexec, or None."""
    for folder in os.environ.get("PATH", "").split(os.pathsep) + [os.path.dirname(OUTSIDE_PATH)]:
        path = os.path.join(folder, "trtexec")
        if folder and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def located():
    """Command that starts trtexec, or where there is none TensorRT's Python module in its place; a Failure without either."""
    path = locate()
    found = ([path], path) if path is not None else trtpython.located()
    if found is None:
        raise Failure(
            "BackendUnavailableError",
            "the board must have trtexec or the Python module tensorrt to build TensorRT engines, found neither: no trtexec in "
            "PATH and none at %s." % OUTSIDE_PATH,
            "apt-get install libnvinfer-bin, or python3-libnvinfer (on the board; JetPack has both)",
        )
    return found[0]


def find(request, emit):
    """What builds engines and which release it is of; a Failure when there is none, or it does not start."""
    words = located()
    banner = first_words(words)
    match = BANNER.search(banner)
    if match is None:
        last = banner.strip().splitlines()[-1:] or ["nothing"]
        raise Failure(
            "BackendUnavailableError",
            "%s must tell its version, it says: %s." % (by(words), last[0][:200].rstrip(".")),
            "%s --help (on the board)" % words[0] if len(words) == 1 else "%s -c 'import tensorrt' (on the board)" % words[0],
        )
    return {"program": words, "version_tag": match.group(1), "banner": match.group(0)}


def by(words):
    """What a command of `located` is, for a person."""
    return words[0] if len(words) == 1 else "the Python module tensorrt of %s" % words[0]


def first_words(words):
    """What ``trtexec --help`` prints: it needs no GPU, and its first line has the version."""
    if len(words) > 1:
        return trtpython.first_words(words)
    try:
        done = subprocess.run(
            words + ["--help"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=ANSWER_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.decode("utf-8", "replace")


def describe(cache):
    """Version and hash of TensorRT's library for the probe, or None where nothing tells its version.

    Args:
        cache: `runtimes.Cache`: starting trtexec and hashing hundreds of megabytes takes seconds.
    """
    path = locate()
    words = [path]
    if path is None:
        found = trtpython.located()
        if found is None:
            return None
        words, path = found
    key = "trtexec:%s" % cache.key(path)
    entry = cache.entries.get(key)
    if entry is None or not os.path.isfile(entry["library"]) or cache.key(entry["library"]) != entry["library_key"]:
        match = BANNER.search(first_words(words))
        if match is None:
            return None
        told = version(int(match.group(1)))
        library = library_of(path, told.partition(".")[0]) or path
        entry = {
            "version": told,
            "sha256": store.file_sha256(library),
            "library": library,
            "library_key": cache.key(library),
        }
        cache.entries[key] = entry
    return {"version": entry["version"], "sha256": entry["sha256"]}


def version(number):
    """``"10.3.0"`` for 100300; up to TensorRT 9 the number has three digits after the major version, later four."""
    unit = 10000 if number >= 100000 else 1000
    return "%d.%d.%d" % (number // unit, number % unit // 100, number % 100)


def library_of(path, major):
    """TensorRT's library of a trtexec's own major version, or None; releases of several can lie side by side."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    beside = os.path.dirname(os.path.dirname(os.path.realpath(path)))
    # The second is where NVIDIA's wheels have it.
    folders += [os.path.join(beside, "lib"), os.path.join(beside, "tensorrt_libs")]
    for folder in folders + list(LIBRARY_FOLDERS):
        found = sorted(glob.glob(os.path.join(folder, "libnvinfer.so.%s*" % major))) if folder else []
        if found:
            return os.path.realpath(found[-1])
    return None


def run(request, emit):
    """One step of a build, started, followed, or found finished."""
    root, folder = request["root"], folder_of(request)
    os.makedirs(folder, exist_ok=True)
    places = {"{work}": folder, "{store}": os.path.join(root, "store"), "{root}": root}
    program = located()
    words = program + [placed(word, places) for word in request["arguments"]]
    step = Step(folder, request["step"], words)
    started = time.time()
    found = step.start(request["outputs"])
    if found != "finished":
        step.follow(emit)
    result = {
        "returncode": step.returncode(),
        "log": step.tail(),
        "log_path": step.log,
        "seconds": round(time.time() - started, 3),
        "by": "trtexec" if len(program) == 1 else "TensorRT's Python module",
        "found": found,
        "outputs": {},
    }
    if result["returncode"] == 0:
        result["outputs"] = outputs(root, folder, request)
        if found != "finished":
            step.vouch({name: entry["sha256"] for name, entry in result["outputs"].items()})
    return result


def forget(request, emit):
    """Let the next run start a step anew, whatever it left."""
    status = Step(folder_of(request), request["step"], []).status
    if os.path.exists(status):
        os.remove(status)
    return {}


def folder_of(request):
    """Folder of the build that a request is about; a Failure where it or the step is not named as they are."""
    if not WORK.match(request["work"]) or not re.match(r"^[a-z]+$", request["step"]):
        raise Failure("CommandError", "work must be a hash and step a word, found %r." % (request["work"],))
    return os.path.join(request["root"], "tensorrt", request["work"])


def placed(word, places):
    """An argument with the board's own folders in it."""
    for name, path in places.items():
        word = word.replace(name, path)
    return word


def outputs(root, folder, request):
    """Hash and size of what a step wrote; what is to be kept becomes a blob of the store too, without a second upload."""
    found = {}
    for name in request["outputs"]:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        sha256 = store.file_sha256(path)
        found[name] = {"sha256": sha256, "size": os.path.getsize(path)}
        if name in request.get("keep", ()) and not os.path.isfile(store.blob_path(root, sha256)):
            incoming = os.path.join(root, "incoming")
            os.makedirs(incoming, exist_ok=True)
            partial = os.path.join(incoming, sha256)
            if os.path.exists(partial):
                os.remove(partial)
            os.link(path, partial)
            store.adopt(root, [sha256])
        if name in request.get("keep", ()):
            remember(root, sha256, request.get("engine_arguments", []))
    return found


def remember(root, sha256, arguments):
    """Note what every use of an engine must be told; an engine file does not say it."""
    folder = os.path.join(root, "tensorrt", "engines")
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, sha256 + ".partial")
    with open(partial, "w") as file:
        json.dump({"arguments": arguments}, file)
    os.replace(partial, os.path.join(folder, sha256 + ".json"))


def recalled(path):
    """What `remember` noted of an engine in the store or in a release; nothing where it was built on another board."""
    name = os.path.basename(path)
    sha256 = name if re.match(r"^[0-9a-f]{64}$", name) else store.file_sha256(path)
    folder = os.path.dirname(os.path.abspath(path))
    for _ in range(4):
        try:
            with open(os.path.join(folder, "tensorrt", "engines", sha256 + ".json")) as file:
                return [str(word) for word in json.load(file)["arguments"]]
        except (IOError, OSError, ValueError, KeyError, TypeError):
            folder = os.path.dirname(folder)
    return []


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


ACTIONS = {"find": find, "run": run, "forget": forget}
