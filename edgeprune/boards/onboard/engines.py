"""Engines on the board: load one from the store, run it, fill its inputs. Python >= 3.6; numpy and the runtime on use.

An engine entry of a request is ``{"blob": sha256}`` or, where many tiny engines travel in one file,
``{"blob": sha256 of a zip, "member": name}``. ``"kind"`` is ``"network"`` (default) or ``"kernel"``: an engine that holds
one kernel exactly as the runtime would write it must not be optimized a second time; ``"function"`` is one function of TVM
without a network around it.
"""

import base64
import os
import shutil
import tempfile
import zipfile

import failures

# An ONNX model of one Identity node on one float: IR 7, opset 13. Its run time is what a call costs by itself.
EMPTY_ONNX = base64.b64decode(
    "CAc6NwoQCgF4EgF5IghJZGVudGl0eRIBZVoPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEA0="
)

_NUMPY_NAMES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint64)": "uint64",
    "tensor(uint32)": "uint32",
    "tensor(uint16)": "uint16",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def require(name):
    """Import a module that edgeprune does not bring to the board.

    Raises:
        failures.Failure: BackendUnavailableError when the board's Python lacks it.
    """
    try:
        return __import__(name)
    except ImportError as error:
        raise failures.Failure(
            error="BackendUnavailableError",
            message="the board's Python must have %s to run engines, found that it does not import (%s)."
            % (name, error),
            hint="edgeprune device setup BOARD%s" % (" --backend tvm" if name == "tvm" else ""),
        )


def load(entry, store, runtime="onnxruntime", threads=1):
    """Load one engine of a request.

    Args:
        entry: The engine entry (see the module's text).
        store: Folder of the board's content-addressed files.
        runtime: Which runtime executes it, a key of `ENGINES`.
        threads: Threads inside one operation; operations run one after the other.

    Raises:
        failures.Failure: TransferError when the blob is not in the store, BackendError when the runtime refuses it.
    """
    path = os.path.join(store, entry["blob"])
    if not os.path.isfile(path):
        raise failures.Failure(
            error="TransferError",
            message="the board's store must hold the engine %s, found no such file." % entry["blob"],
            hint="run the command again: what is missing is uploaded first",
        )
    source = path
    if entry.get("member") is not None:
        # A member is named by its hash: what the store has as a file of its own need not be unpacked.
        source = os.path.join(store, entry["member"])
        if runtime not in FILES_ONLY or not os.path.isfile(source):
            with zipfile.ZipFile(path) as bundle:
                source = bundle.read(entry["member"])
    if runtime not in ENGINES:
        raise failures.Failure(
            error="BackendUnavailableError",
            message="the runtime must be one of %s, found %r." % (", ".join(sorted(ENGINES)), runtime),
            hint="update edgeprune on the host",
        )
    return ENGINES[runtime](source, entry.get("kind", "network"), threads)


def empty(runtime, loaded):
    """An engine that does nothing: its run time is what a call of the runtime costs by itself.

    Args:
        runtime: A key of `ENGINES`.
        loaded: Engines of that runtime; a runtime whose engines are compiled takes its own from one of them.

    Returns:
        None where none can be made, because nothing is loaded.
    """
    if runtime == "onnxruntime":
        return OnnxEngine(EMPTY_ONNX, "empty", 1)
    return loaded[0].empty() if loaded else None


def pattern(shape, dtype):
    """A fixed array for one input: in [-1, 1) for floats, 0 or 1 for integers and booleans; never subnormal.

    Args:
        shape: Dimensions.
        dtype: NumPy name.
    """
    numpy = require("numpy")
    count = 1
    for size in shape:
        count *= size
    # Multiples of a large odd number modulo 2**32: spread evenly, same on every machine and numpy version.
    steps = (numpy.arange(1, count + 1, dtype=numpy.uint64) * numpy.uint64(2654435761)) % numpy.uint64(2**32)
    if numpy.dtype(dtype).kind == "f":
        values = steps.astype(numpy.float64) / 2.0**31 - 1.0
        values[numpy.abs(values) < 2.0**-12] = 2.0**-12
    else:
        values = (steps >> numpy.uint64(16)) & numpy.uint64(1)
    return values.astype(dtype).reshape(shape)


class OnnxEngine(object):
    """One ONNX Runtime session on the CPU, with inputs and outputs bound once and reused by every run.

    Args:
        source: Path or bytes of the ONNX file.
        kind: ``"network"`` (optimized as far as the runtime can), ``"kernel"`` (constants are folded, nothing else), or
            ``"empty"`` (taken as it is).
        threads: Threads inside one operation.
        trace: Beginning of the path of a file that the runtime writes its trace to, or None.
    """

    def __init__(self, source, kind="network", threads=1, trace=None):
        self._source, self._kind, self._threads = source, kind, threads
        self._numpy = require("numpy")
        self._runtime = ort = require("onnxruntime")
        levels = {
            "network": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
            "kernel": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            "empty": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        }
        options = ort.SessionOptions()
        options.graph_optimization_level = levels[kind]
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        if trace is not None:
            options.enable_profiling, options.profile_file_prefix = True, trace
        try:
            self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except _refusals() as error:
            raise _refusal("load", ort, error)
        self.inputs = [(tensor.name, _sizes(tensor), _dtype(tensor)) for tensor in self._session.get_inputs()]
        self.outputs = [tensor.name for tensor in self._session.get_outputs()]
        self._binding = None
        self._held = []

    def bind(self, arrays=None):
        """Bind inputs and preallocated outputs, so that `run` allocates nothing.

        Args:
            arrays: Input name to array; those not given are filled with `pattern`.
        """
        ort = self._runtime
        binding = self._session.io_binding()
        held = []
        for name, shape, dtype in self.inputs:
            array = pattern(shape, dtype) if arrays is None or name not in arrays else arrays[name]
            value = ort.OrtValue.ortvalue_from_numpy(self._numpy.ascontiguousarray(array))
            held.append(value)
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        # One run with outputs that the runtime allocates tells their shapes, also where the file leaves them out.
        try:
            self._session.run_with_iobinding(binding)
        except _refusals() as error:
            raise _refusal("run", ort, error)
        for name, made in zip(self.outputs, binding.get_outputs()):
            array = made.numpy()
            value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, "cpu")
            held.append(value)
            binding.bind_ortvalue_output(name, value)
        # And one into these: what does not fit is refused now, not in the middle of a timing.
        try:
            self._session.run_with_iobinding(binding)
        except _refusals() as error:
            raise _refusal("run", ort, error)
        self._binding, self._held = binding, held

    def run(self, times):
        """Run the bound engine `times` times, back to back."""
        if self._binding is None:
            self.bind()
        execute, binding = self._session.run_with_iobinding, self._binding
        for _ in range(times):
            execute(binding)

    def traced(self, runs):
        """What each kernel takes, see `layers`: a session of its own, which writes a trace."""
        import layers

        folder = tempfile.mkdtemp(prefix="edgeprune-")
        try:
            twin = OnnxEngine(self._source, self._kind, self._threads, os.path.join(folder, "trace"))
            twin.bind()
            twin.run(runs)
            with open(twin._session.end_profiling()) as file:
                return layers.of_onnxruntime(file.read())
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def compute(self, arrays):
        """Outputs by name for inputs by name (NumPy arrays); for comparing numbers, not for timing."""
        return dict(zip(self.outputs, self._session.run(self.outputs, arrays)))


def _refusals():
    """The exception classes that the runtime raises; they have no common base, and versions add to them."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    return tuple(own) + (RuntimeError, ValueError, OSError)


def _refusal(what, runtime, error):
    reason = " ".join(str(error).split())[:400].rstrip(".")
    return failures.Failure(
        error="BackendError",
        message="ONNX Runtime %s on the board must %s the engine, found: %s." % (runtime.__version__, what, reason),
        hint="edgeprune doctor",
    )


def _sizes(tensor):
    for size in tensor.shape:
        if not isinstance(size, int):
            raise failures.Failure(
                error="BackendError",
                message="every input size of an engine must be fixed, found %r in input %s." % (size, tensor.name),
                hint="export the model at its deployment batch size",
            )
    return tuple(tensor.shape)


def _dtype(tensor):
    if tensor.type not in _NUMPY_NAMES:
        raise failures.Failure(
            error="BackendError",
            message="an engine's inputs must be plain numbers, found %s in input %s." % (tensor.type, tensor.name),
        )
    return _NUMPY_NAMES[tensor.type]


def _tvm_engine(source, kind, threads):
    import tvm_engine

    return (tvm_engine.TvmFunction if kind == "function" else tvm_engine.TvmEngine)(source, threads)


def _trtexec_engine(source, kind, threads):
    import trtexec_engine

    return trtexec_engine.TrtexecEngine(source)


# Runtimes that load engines from files, not from memory.
FILES_ONLY = ("tensorrt",)
# Runtime to what loads its engines, called with path or bytes, kind and threads; one line each.
ENGINES = {"onnxruntime": OnnxEngine, "tvm": _tvm_engine, "tensorrt": _trtexec_engine}
