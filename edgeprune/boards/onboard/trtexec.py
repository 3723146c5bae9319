"""NVIDIA's trtexec on the board: where it is, which TensorRT it belongs to, and runs of it that outlive a lost link.

Where it is missing TensorRT's Python module stands in (`trtpython`). How a run outlives a link is `builds`.
"""

import glob
import json
import os
import re
import subprocess
import time

import store
import trtpython
from builds import WORK, Step
from failures import Failure

# TensorRT's packages install it where no shell looks.
OUTSIDE_PATH = "/usr/src/tensorrt/bin/trtexec"
BANNER = re.compile(r"\[TensorRT v(\d+)\]")
LIBRARY_FOLDERS = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/local/tensorrt/lib", "/usr/local/TensorRT*/lib")
ANSWER_S = 60.0


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


ACTIONS = {"find": find, "run": run, "forget": forget}
