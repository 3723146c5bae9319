"""Which runtimes the board's Python has: version, hash of the shared library, and whether it loads at all.

Two builds of one version can differ in speed, so a latency table names the library by its hash. Hashing tens of megabytes
and starting a process to load them takes seconds on a small board; both are remembered by path, size and time of change.
"""

import glob
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys

import store
import trtexec
from failures import Failure

# Name: Python module, the library that holds the kernels, and what `import` needs besides.
RUNTIMES = {
    "onnxruntime": ("onnxruntime", "capi/onnxruntime_pybind11_state*.so"),
    "tvm": ("tvm", "lib/libtvm_runtime.so"),
}
# Who does not use it does not miss it: that it is not installed is told by what requires it.
OPTIONAL = ("tvm",)


def probe(root, keep=True):
    """({name: {"version", "sha256"}}, sentences on those that are missing, or do not load); `keep` what was found."""
    cache = Cache(os.path.join(root, "libraries.json"))
    found, absent = {}, []
    for name, (module, pattern) in sorted(RUNTIMES.items()):
        if name in OPTIONAL and importlib.util.find_spec(module) is None:
            continue
        try:
            found[name] = describe(module, pattern, cache)
        except Failure as failure:
            absent.append(failure.message)
    tensorrt = trtexec.describe(cache)
    if tensorrt is not None:
        found["tensorrt"] = tensorrt
    if keep:
        cache.save()
    return found, absent


def describe(module, pattern, cache):
    """Version and hash of one runtime; a Failure says what is missing. Nothing of it is loaded into this process."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        raise Failure("BackendUnavailableError", "%s is not installed for %s." % (module, sys.executable))
    folder = os.path.dirname(spec.origin)
    libraries = sorted(glob.glob(os.path.join(folder, pattern)))
    if not libraries:
        raise Failure("BackendUnavailableError", "%s at %s has no shared library %s." % (module, folder, pattern))
    key = cache.key(libraries[0])
    entry = cache.entries.get(key)
    # Files of earlier versions hold failures too.
    if entry is None or entry.get("failure"):
        failure = import_failure(module)
        if failure is not None:
            # Not remembered: what mends it (numpy, a system library) does not change the file that the key is made of.
            raise Failure(
                "BackendUnavailableError",
                "%s is installed for %s, but does not load: %s." % (module, sys.executable, failure),
            )
        entry = {"sha256": store.file_sha256(libraries[0])}
        cache.entries[key] = entry
    return {"version": version(spec.origin), "sha256": entry["sha256"]}


def import_failure(module):
    """Why a module does not load, or None. In a process of its own: a wrong build dies of an illegal instruction."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import " + module],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=50.0,
        )
    except subprocess.TimeoutExpired:
        return "no answer within 50 s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return "killed by signal %s" % signal.Signals(-done.returncode).name
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "exit code %d" % done.returncode


def version(init_path):
    """Version that a package's ``__init__.py`` or ``_version.py`` states, read as text: importing it takes long."""
    for path in (init_path, os.path.join(os.path.dirname(init_path), "_version.py")):
        if not os.path.isfile(path):
            continue
        with open(path, "rb") as file:
            text = file.read().decode("utf-8", "replace")
        match = re.search(r"""^__version__\s*=\s*(?:\w+\s*=\s*)?["']([^"']+)["']""", text, re.M)
        if match:
            return match.group(1)
    return "unknown"


class Cache(object):
    """Small JSON file in the root folder; a lost or broken one costs time and nothing else."""

    def __init__(self, path):
        self.path = path
        try:
            with open(path) as file:
                entries = json.load(file)
        except (IOError, OSError, ValueError):
            entries = {}
        self.entries = entries if isinstance(entries, dict) else {}
        self.before = json.dumps(self.entries, sort_keys=True)

    def key(self, library):
        """Changes whenever the library, or the Python that would load it, does."""
        stat = os.stat(library)
        return "%s:%d:%d:%s" % (library, stat.st_size, stat.st_mtime_ns, sys.executable)

    def save(self):
        """Write what is new, whole or not at all; a full or read-only disk is not the probe's trouble."""
        text = json.dumps(self.entries, sort_keys=True)
        if text == self.before:
            return
        partial = "%s.%d.partial" % (self.path, os.getpid())
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(partial, "w") as file:
                file.write(text)
            os.replace(partial, self.path)
        except OSError:
            if os.path.exists(partial):
                os.remove(partial)
