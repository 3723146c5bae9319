"""An engine that trtexec repeats in a process of its own, for as long as its power is read. Python >= 3.6, stdlib only.

Loading the engine is no part of a replay: trtexec says when it begins to infer. How long one inference took it says at its end,
by how many queries it made in what time, warm-up left out.

Source of its words: NVIDIA/TensorRT, samples/trtexec/trtexec.cpp ("Starting inference") and samples/common/sampleReporting.cpp,
``printProlog``; each line is flushed (samples/common/logging.h).
"""

import os
import re
import shutil
import subprocess
import tempfile
import time

BEGUN = "Starting inference"
COUNTED = re.compile(r"Timing trace has (\d+) queries over ([0-9.eE+-]+) s")
POLL_S = 0.01


class Replay(object):
    """One process that repeats an engine; a context, at whose end it is gone.

    Args:
        command: Words of trtexec, which say for how long.
        limit_s: Longest time until it begins, and again from when it should end until it does, seconds.
        refusal: Makes the failure of a sentence on what was found.
    """

    def __init__(self, command, limit_s, refusal):
        self._limit_s, self._refusal = limit_s, refusal
        self._folder = tempfile.mkdtemp(prefix="edgeprune-")
        self._log = os.path.join(self._folder, "replay.log")
        with open(self._log, "wb") as log:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self._folder
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        shutil.rmtree(self._folder, True)

    def begin(self):
        """Return when it infers; a failure where it does not come to that."""
        until = time.monotonic() + self._limit_s
        while BEGUN not in self._said():
            if self._child.poll() is not None:
                self._refuse()
            if time.monotonic() > until:
                raise self._refusal("nothing that infers within %d s" % self._limit_s)
            time.sleep(POLL_S)

    def cpu_s(self):
        """Processor time that it has used so far, seconds; 0 where the kernel does not tell."""
        try:
            with open("/proc/%d/stat" % self._child.pid) as file:
                fields = file.read().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))
        except (IOError, OSError, ValueError, IndexError):
            return 0.0

    def infers(self):
        """Whether it still does, or a failure where it has ended badly."""
        code = self._child.poll()
        if code:
            self._refuse()
        return code is None and COUNTED.search(self._said()) is None

    def query_s(self):
        """Wait for its end; seconds from one query to the next."""
        try:
            self._child.wait(timeout=self._limit_s)
        except subprocess.TimeoutExpired:
            raise self._refusal("no end within %d s" % self._limit_s)
        found = COUNTED.search(self._said())
        if self._child.returncode != 0 or found is None:
            self._refuse()
        queries, seconds = int(found.group(1)), float(found.group(2))
        if queries < 1 or not seconds > 0.0:
            raise self._refusal("%s queries in %s s" % found.groups())
        return seconds / queries

    def _said(self):
        with open(self._log, "rb") as file:
            return file.read().decode("utf-8", "replace")

    def _refuse(self):
        said = [line.partition("[E]")[2].strip() for line in self._said().splitlines() if "[E]" in line]
        raise self._refusal((said or ["exit code %s and no error" % self._child.returncode])[0][:400])
