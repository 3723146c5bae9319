"""One verb of the runner: the request is one line of JSON on standard input, events are lines of JSON on standard output.

The last event is ``{"event": "result", "result": {...}}`` or ``{"event": "error", ...}``. Whatever a library prints goes
to standard error, so that it cannot be taken for an event. The input stays open while the host lives; verbs that hold
something on the board (``lock``) wait for its end.
"""

import errno
import importlib
import json
import os
import sys

from failures import Failure

VERBS = {
    "probe": "probe",
    "store": "store",
    "lock": "lock",
    "clocks": "clocks",
    "sustain": "sustain",
    "bench": "bench",
    "layers": "layers",
    "kept": "kept",
    "environment": "environment",
    "clean": "cleaning",
    "power": "power",
    "energy": "energy",
    "parity": "parity",
    "trtexec": "trtexec",
    "stage": "releases",
    "activate": "releases",
    "rollback": "releases",
    "refuse": "releases",
    "confirm": "releases",
    "gc": "releases",
    "status": "releases",
    "window": "window",
    "guard": "guard",
    "verify": "verifying",
}

TIMED = ("bench", "layers", "sustain", "energy")
"""Verbs whose answers are times."""

BOUND = TIMED + ("probe",)
"""Verbs that keep to the cores that the host asks for. Others may start programs of the user, which are not bound."""

FULL = (errno.ENOSPC, errno.EDQUOT)


def run(verb, line, emit):
    """Run one verb; the result, or a Failure."""
    if verb not in VERBS:
        raise Failure("CommandError", "the verb must be one of %s, found %r." % (", ".join(sorted(VERBS)), verb))
    try:
        request = json.loads(line)
    except ValueError as error:
        raise Failure("CommandError", "the request must be one line of JSON, found %r (%s)." % (line[:80], error))
    if verb in TIMED and importlib.import_module("processor").emulated():
        raise Failure(
            "EmulatedProcessorError",
            "the processor must be a real one to time anything on it, found an emulated %s." % os.uname().machine,
            "deploy without a budget checks the numbers there, and times nothing",
        )
    if verb in BOUND and request.get("cores"):
        importlib.import_module("processor").bind(request["cores"])
    request["verb"] = verb
    module = importlib.import_module(VERBS[verb])
    try:
        return module.main(request, emit)
    except OSError as error:
        raise failure_of(error, request.get("root", "/"))


def failure_of(error, root):
    """What an operating system error means to the host."""
    where = error.filename or root
    if error.errno in FULL:
        return Failure(
            "BoardFullError",
            "the board must have free space at %s, found none left." % where,
            "free some space there, or give the board another root folder",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Failure(
            "CommandError",
            "the board's user must be able to write to %s, found: %s." % (where, error.strerror),
            "give the board another root folder",
        )
    raise error


def main(argv):
    """Entry point; the exit code is 0 for a result and 1 for an error event."""
    # Native libraries print to file descriptor 1 as they like; keep the real one for events alone.
    events = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)

    def emit(event):
        events.write(json.dumps(event).encode("ascii") + b"\n")

    # ONNX Runtime's import starts a telemetry client that writes an identity of the device into the user's home.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # TVM's compiler is 250 MB that nothing here calls; its runtime is 3 MB.
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    # One line, not the whole input: its end is what `lock` waits for.
    line = os.fdopen(os.dup(0), "rb").readline().decode("utf-8")
    try:
        result = run(argv[1] if len(argv) > 1 else "", line, emit)
    except Failure as failure:
        emit(failure.event())
        return 1
    except BrokenPipeError:
        return 1
    emit({"event": "result", "result": result})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
