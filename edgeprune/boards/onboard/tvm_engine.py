"""TVM engines on the board: a shared library with a description behind it (a ZIP archive at its end). Python >= 3.6."""

import io
import json
import os
import shutil
import tempfile
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
        self._machine = None
        try:
            with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
                told = json.loads(archive.read(MEMBER).decode("utf-8"))
        except (ValueError, KeyError, zipfile.BadZipfile) as error:
            raise self._refusal("load", "it is no TVM engine of edgeprune (%s)" % error)
        # A library of another architecture, or code with instructions that are missing, must not get as far as being run.
        machine = os.uname().machine
        if told["architecture"] != machine:
            raise self._refusal("load", "it is compiled for %s, and the board is %s" % (told["architecture"], machine))
        self.inputs = [(item["name"], tuple(item["shape"]), item["dtype"]) for item in told["inputs"]]
        self.outputs = [item["name"] for item in told["outputs"]]
        self._weights = told["weights"]
        try:
            # 1: the fast cores come first where there are several kinds.
            tvm.get_global_func("runtime.config_threadpool")(1, threads)
            self._machine = _machine(tvm, source)
        except _refusals() as error:
            raise self._refusal("load", error)
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
        self._arguments = [self._tvm.runtime.tensor(self._numpy.ascontiguousarray(value)) for value in values]
        try:
            self._call(*self._arguments)
        except _refusals() as error:
            raise self._refusal("run", error)

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

    def empty(self):
        """The engine's function that only returns its argument, as an engine."""
        return _Empty(self._machine["empty"], self._tvm.runtime.tensor(self._numpy.zeros((1,), "float32")))

    def _refusal(self, what, error):
        reason = " ".join(str(error).split())[:400].rstrip(".")
        return failures.Failure(
            error="BackendError",
            message="TVM %s on the board must %s the engine, found: %s." % (self._tvm.__version__, what, reason),
            hint="edgeprune compile --backend tvm --board BOARD",
        )


class _Empty(object):
    def __init__(self, call, argument):
        self._call, self._argument = call, argument

    def run(self, times):
        call, argument = self._call, self._argument
        for _ in range(times):
            call(argument)


def _machine(tvm, source):
    """The virtual machine of an engine file.

    The loader goes by the end of the file's name, which a store does not keep, so a copy gets one that it knows. The copy can
    go as soon as the library is mapped.
    """
    from tvm.runtime.vm import VirtualMachine

    folder = tempfile.mkdtemp(prefix="edgeprune-")
    path = os.path.join(folder, "engine.so")
    try:
        if isinstance(source, bytes):
            with open(path, "wb") as file:
                file.write(source)
        else:
            shutil.copyfile(source, path)
        return VirtualMachine(tvm.runtime.load_module(path), tvm.runtime.cpu())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refusals():
    """What TVM raises: its own classes derive from these."""
    return (RuntimeError, ValueError, TypeError, AttributeError, OSError)
