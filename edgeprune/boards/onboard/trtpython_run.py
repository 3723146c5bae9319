"""Runs an engine by TensorRT's Python module: outputs, times on the device, times of its layers. Python >= 3.6, stdlib only."""

import json
import random
import struct
import time

import cudart
from trtpython import Refused, say, tag, write

# DataType to (bytes of a number, its form in `struct`).
TYPES = {
    "FLOAT": (4, "f"),
    "HALF": (2, "e"),
    "INT8": (1, "b"),
    "UINT8": (1, "B"),
    "BOOL": (1, "?"),
    "INT32": (4, "i"),
    "INT64": (8, "q"),
}
PROFILED = 20
DRAWN = 4096


def infer(tensorrt, engine, given):
    """Run an engine as the options say.

    Raises:
        Refused: It cannot be run; the CUDA library's word is in it.
    """
    try:
        running = Running(tensorrt, engine, spinning="--useSpinWait" in given or quiet(tensorrt) and "--noSpinWait" not in given)
        running.fill(given.get("--loadInputs", ""))
        running.once()
        # The words by which trtexec says so: a replay is timed by them, see `trtexec_replay`.
        say("[I]", "Starting inference")
        timed, seconds = time_queries(running, given, graph=graphed(tensorrt, given))
        say("[I]", "Timing trace has %d queries over %g s" % (len(timed), seconds))
        if "--exportTimes" in given:
            write(given["--exportTimes"], json.dumps([{"latencyMs": ms, "computeMs": ms} for ms in timed]).encode("ascii"))
        if "--exportOutput" in given:
            write(given["--exportOutput"], outputs(running).encode("ascii"))
        if "--exportProfile" in given:
            write(given["--exportProfile"], json.dumps(profile(tensorrt, running)).encode("utf-8"))
    except cudart.CudaError as error:
        raise Refused("Error[1]: %s" % error)


class Running(object):
    """An engine with memory for its inputs and outputs.

    Args:
        tensorrt: The module.
        engine: The engine, of static shapes.
        spinning: Whether what waits for the device keeps its core.
    """

    def __init__(self, tensorrt, engine, spinning):
        self.cuda = cudart.Cuda(spinning=spinning)
        self.context = engine.create_execution_context()
        if self.context is None:
            raise Refused("Unable to create execution context")
        self.inputs, self.outputs = {}, {}
        for number in range(engine.num_io_tensors):
            name = engine.get_tensor_name(number)
            shape = tuple(int(size) for size in engine.get_tensor_shape(name))
            kind = engine.get_tensor_dtype(name).name
            if kind not in TYPES or any(size < 0 for size in shape):
                raise Refused("tensors must have fixed shapes and plain numbers, found %s of %s %s" % (name, kind, shape))
            count = 1
            for size in shape:
                count *= size
            address = self.cuda.allocate(count * TYPES[kind][0])
            if not self.context.set_tensor_address(name, address):
                raise Refused("Unable to set the address of %s" % name)
            mode = engine.get_tensor_mode(name)
            (self.inputs if mode == tensorrt.TensorIOMode.INPUT else self.outputs)[name] = (shape, kind, count, address)

    def fill(self, pairs):
        """Load inputs from files, ``name:path,name:path``; the others get small random numbers."""
        files = dict(pair.split(":", 1) for pair in pairs.split(",") if pair)
        for name, (_, kind, count, address) in self.inputs.items():
            width, form = TYPES[kind]
            if name not in files:
                content = drawn(form, count)
            else:
                with open(files.pop(name), "rb") as file:
                    content = file.read()
            if len(content) != width * count:
                raise Refused("the file of %s must have %d bytes, found %d" % (name, width * count, len(content)))
            self.cuda.upload(address, content)
        if files:
            raise Refused("Invalid tensor names found in --loadInputs flag.")

    def enqueue(self):
        """Give one inference to the stream."""
        if not self.context.execute_async_v3(self.cuda.stream):
            raise Refused("Error occurred during inference")

    def once(self):
        """One inference, to its end."""
        self.enqueue()
        self.cuda.wait()


def drawn(form, count):
    """Bytes of `count` numbers: real ones in [-1, 1], whole ones 0, so that an index is one."""
    if form not in "fe":
        return struct.pack("<%d%s" % (count, form), *([0] * count))
    few = [random.uniform(-1.0, 1.0) for _ in range(min(count, DRAWN))]
    block = struct.pack("<%d%s" % (len(few), form), *few)
    width = len(block) // max(1, len(few))
    return (block * (count // max(1, len(few)) + 1))[: count * width]


def graphed(tensorrt, given):
    """Whether queries are timed as a CUDA graph: trtexec's default since TensorRT 11."""
    return "--useCudaGraph" in given or quiet(tensorrt) and "--noCudaGraph" not in given


def quiet(tensorrt):
    """Whether it is a release whose trtexec has CUDA graph and spin wait by default."""
    return tag(tensorrt.__version__) >= 110000


def time_queries(running, given, graph):
    """Time of each query on the device, milliseconds, and what all of them took from the first to the end of the last, seconds.

    As trtexec does, the next query is given to the device before the end of the last one is waited for: what the host takes to
    give it would else stand between a query's two events.
    """
    cuda, work = running.cuda, running.enqueue
    if graph:
        try:
            cuda.capture(running.enqueue)
            work = cuda.launch
        except (cudart.CudaError, Refused) as error:
            say("[W]", "The CUDA graph cannot be captured (%s): timed without." % error)
    warm = time.monotonic() + float(given.get("--warmUp", 200)) / 1e3
    while time.monotonic() < warm:
        work()
        cuda.wait()
    begun = time.monotonic()
    end = begun + float(given.get("--duration", 3))
    least, found, events = int(given.get("--iterations", 10)), [], []
    free = [(cuda.event(), cuda.event()) for _ in range(2)]
    while len(found) + len(events) < least or time.monotonic() < end:
        if not free:
            found.append(cuda.elapsed_ms(*events[0]))
            free.append(events.pop(0))
        pair = free.pop()
        cuda.record(pair[0])
        work()
        cuda.record(pair[1])
        events.append(pair)
    found.extend(cuda.elapsed_ms(*pair) for pair in events)
    return found, time.monotonic() - begun


def outputs(running):
    """The outputs in trtexec's form, each number with all its digits."""
    parts = []
    for name, (shape, kind, count, address) in running.outputs.items():
        width, form = TYPES[kind]
        values = struct.unpack("<%d%s" % (count, form), running.cuda.download(address, count * width))
        text = ", ".join("%.9g" % value for value in values)
        dimensions = "x".join(str(size) for size in shape)
        parts.append('{ "name" : %s\n  , "dimensions" : "%s"\n  , "values" : [ %s ]\n  }' % (json.dumps(name), dimensions, text))
    return "[\n  %s\n]\n" % "\n, ".join(parts)


def profile(tensorrt, running):
    """Times of the layers in trtexec's form; a run of its own, without a graph, for it slows the whole."""
    rows = {}

    class Rows(tensorrt.IProfiler):
        def __init__(self):
            tensorrt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name, ms):
            rows.setdefault((layer_name, seen.setdefault(layer_name, 0)), []).append(ms)
            seen[layer_name] += 1

    seen = {}
    # TensorRT keeps no reference of its own to it.
    running.profiler = running.context.profiler = Rows()
    for _ in range(PROFILED):
        seen.clear()
        running.once()
    return [{"count": PROFILED}] + [
        {"name": name, "timeMs": sum(times), "averageMs": sum(times) / len(times), "medianMs": sorted(times)[len(times) // 2]}
        for (name, _), times in rows.items()
    ]
