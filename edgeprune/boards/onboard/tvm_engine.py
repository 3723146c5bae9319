"""TVM engines on the board: a shared library with a description behind it (a ZIP archive at its end). Python >= 3.6."""

import io
import json
import os
import shutil
import tempfile
import time
import zipfile

import engines
import failures

MEMBER = "edgeprune.json"


class TvmEngine(object):
    """One compiled network in TVM's virtual machine on the CPU, with its arguments bound once and reused by every run.

    Args:
        source: Path or bytes of the engine file.
        threads: Threads inside one function.
    """

    def __init__(self, source, threads=1):
        self._numpy = engines.require("numpy")
        self._tvm = tvm = engines.require("tvm")
        from tvm.runtime.vm import VirtualMachine

        told = _described(tvm, source)
        if "function" in told:
            raise _refusal(tvm, "load", "it is a single function, and no network")
        self.inputs = [(item["name"], tuple(item["shape"]), item["dtype"]) for item in told["inputs"]]
        self.outputs = [item["name"] for item in told["outputs"]]
        self._weights = told["weights"]
        calls = told.get("calls", [])
        # Views of memory are calls without a kernel; of an engine that was not made from ONNX no kernel is known.
        self._functions = [function for function, kernel in calls if kernel is not None] or [name for name, _ in calls if name]
        try:
            self._machine = VirtualMachine(_library(tvm, source, threads), tvm.runtime.cpu())
        except _refusals() as error:
            raise _refusal(tvm, "load", error)
        self._call, self._arguments = self._machine["main"], None

    def bind(self, arrays=None):
        """Bind the arguments, so that `run` converts nothing.

        Args:
            arrays: Input name to array; those not given are filled with `engines.pattern`.
        """
        values = [
            engines.pattern(shape, dtype) if arrays is None or name not in arrays else arrays[name]
            for name, shape, dtype in self.inputs
        ]
        for item in self._weights:
            filled = engines.pattern(item["shape"], item["dtype"])
            values.append((filled * item["scale"]).astype(item["dtype"]) if filled.dtype.kind == "f" else filled)
        self._arguments = _tensors(self._tvm, self._numpy, values)
        try:
            self._call(*self._arguments)
        except _refusals() as error:
            raise _refusal(self._tvm, "run", error)

    def run(self, times):
        """Run the bound engine `times` times, back to back."""
        if self._arguments is None:
            self.bind()
        call, arguments = self._call, self._arguments
        for _ in range(times):
            call(*arguments)

    def compute(self, arrays):
        """Outputs by name for inputs by name (NumPy arrays); for comparing numbers, not for timing."""
        self.bind(arrays)
        found = self._call(*self._arguments)
        values = [found] if len(self.outputs) == 1 else list(found)
        return {name: value.numpy() for name, value in zip(self.outputs, values)}

    def traced(self, runs):
        """What each kernel takes, see `layers`: the virtual machine tells when it calls a function, and when that has ended."""
        import layers

        own, clock = set(self._functions), time.perf_counter
        times, begun = [], []

        def note(function, name, before, *rest):
            if name in own:
                if before:
                    begun.append(clock())
                else:
                    times.append((name, 1e6 * (clock() - begun.pop())))
            return 0

        self._machine.set_instrument(note)
        self.run(runs)
        count = len(times) // runs
        parts = [times[start : start + count] for start in range(0, runs * count, count)] if count else []
        return [
            {"name": name, "op": None, "us": layers.middle([part[place][1] for part in parts])}
            for place, (name, _) in enumerate(parts[0] if parts else ())
        ]

    def empty(self):
        """The engine's function that only returns its argument, as an engine."""
        return _Empty(self._machine["empty"], self._tvm.runtime.tensor(self._numpy.zeros((1,), "float32")))


class TvmFunction(object):
    """One function by itself, a candidate of tuning: called with arguments that are there already, inputs and outputs alike.

    Args:
        source: Path or bytes of the engine file.
        threads: Threads inside the function.
    """

    def __init__(self, source, threads=1):
        self._numpy = engines.require("numpy")
        self._tvm = tvm = engines.require("tvm")
        told = _described(tvm, source)
        if "function" not in told:
            raise _refusal(tvm, "load", "it is a network, and no single function")
        self._told, self._arguments = told["arguments"], None
        try:
            # The library must stay as long as its function.
            self._library = _library(tvm, source, threads)
            self._call = self._library[told["function"]]
        except _refusals() as error:
            raise _refusal(tvm, "load", error)

    def bind(self):
        """Make the arguments: positive numbers, of which no operation makes what is no number."""
        filled = [engines.pattern(item["shape"], item["dtype"]) for item in self._told]
        values = [(0.55 + 0.45 * one).astype(one.dtype) if one.dtype.kind == "f" else one for one in filled]
        self._arguments = _tensors(self._tvm, self._numpy, values)
        try:
            self._call(*self._arguments)
        except _refusals() as error:
            raise _refusal(self._tvm, "run", error)

    def run(self, times):
        """Run the function `times` times, back to back."""
        call, arguments = self._call, self._arguments
        for _ in range(times):
            call(*arguments)

    def empty(self):
        """None: nothing of a call is known to be the runtime's alone."""
        return None


class _Empty(object):
    def __init__(self, call, argument):
        self._call, self._argument = call, argument

    def run(self, times):
        call, argument = self._call, self._argument
        for _ in range(times):
            call(argument)


def _described(tvm, source):
    """What stands behind a library's code; a Failure where it is for another architecture.

    A library of another architecture, or code with instructions that are missing, must not get as far as being run.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            told = json.loads(archive.read(MEMBER).decode("utf-8"))
    except (ValueError, KeyError, zipfile.BadZipfile) as error:
        raise _refusal(tvm, "load", "it is no TVM engine of edgeprune (%s)" % error)
    machine = os.uname().machine
    if told["architecture"] != machine:
        raise _refusal(tvm, "load", "it is compiled for %s, and the board is %s" % (told["architecture"], machine))
    return told


def _library(tvm, source, threads):
    """The code of an engine file, loaded.

    The loader goes by the end of the file's name, which a store does not keep, so a copy gets one that it knows. The copy can
    go as soon as the library is mapped.
    """
    # 1: the fast cores come first where there are several kinds.
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    folder = tempfile.mkdtemp(prefix="edgeprune-")
    path = os.path.join(folder, "engine.so")
    try:
        if isinstance(source, bytes):
            with open(path, "wb") as file:
                file.write(source)
        else:
            shutil.copyfile(source, path)
        return tvm.runtime.load_module(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tensors(tvm, numpy, values):
    return [tvm.runtime.tensor(numpy.ascontiguousarray(value)) for value in values]


def _refusals():
    """What TVM raises: its own classes derive from these."""
    return (RuntimeError, ValueError, TypeError, AttributeError, OSError)


def _refusal(tvm, what, error):
    reason = " ".join(str(error).split())[:400].rstrip(".")
    return failures.Failure(
        error="BackendError",
        message="TVM %s on the board must %s the engine, found: %s." % (tvm.__version__, what, reason),
        hint="edgeprune compile --backend tvm --board BOARD",
    )
