"""CUDA's runtime library through ctypes: memory, one stream, events and a graph. Python >= 3.6, stdlib only.

Source: NVIDIA CUDA Runtime API, sections Device, Stream, Event, Memory and Graph Management. `cudaGraphInstantiateWithFlags` is
used because `cudaGraphInstantiate` has other arguments since CUDA 12; it exists since CUDA 11.4, which JetPack 5 has.
"""

import ctypes
import glob

# By name where the loader knows it, else where CUDA's packages put it; the newest of several.
NAMES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
FOLDERS = ("/usr/local/cuda/lib64", "/usr/local/cuda/targets/*/lib", "/usr/local/cuda-*/lib64")
TO_DEVICE, TO_HOST = 1, 2
THREAD_LOCAL = 1
SPIN, BLOCKING = 1, 1
"""Flags of a device, and of an event."""


class CudaError(Exception):
    """A call of the library that did not end with cudaSuccess, or no library."""


class Cuda(object):
    """One device, a stream on it, and what was allocated there.

    Args:
        device: Its number.
        spinning: Whether what waits for the device keeps its core; else what waits for an event sleeps.

    Raises:
        CudaError: There is no library, or no such device.
    """

    def __init__(self, device=0, spinning=True):
        self._library = _library()
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._blocks = []
        self._call("cudaSetDevice", ctypes.c_int(device))
        self._event_flags = 0 if spinning else BLOCKING
        if spinning:
            # Waking up takes longer than a short inference. Before CUDA 12 that is refused once the device is in use, as it is
            # where an engine was loaded already; times between events do not depend on it.
            self._library.cudaSetDeviceFlags(ctypes.c_uint(SPIN))
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        self._stream = stream
        self._graph = None

    @property
    def stream(self):
        """The stream's handle, a number."""
        return self._stream.value or 0

    def allocate(self, size):
        """Address of `size` bytes on the device; they stay as long as the process."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        self._blocks.append(address)
        return address.value

    def upload(self, address, content):
        """Copy bytes to the device."""
        source = ctypes.create_string_buffer(content, len(content))
        size = ctypes.c_size_t(len(content))
        self._call("cudaMemcpy", ctypes.c_void_p(address), source, size, ctypes.c_int(TO_DEVICE))

    def download(self, address, size):
        """Bytes of the device."""
        target = ctypes.create_string_buffer(max(1, size))
        self._call("cudaMemcpy", target, ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(TO_HOST))
        return target.raw[:size]

    def wait(self):
        """Until the stream has done all that it was given."""
        self._call("cudaStreamSynchronize", self._stream)

    def event(self):
        """A new event."""
        made = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(made), ctypes.c_uint(self._event_flags))
        return made

    def record(self, event):
        """Have the stream pass an event."""
        self._call("cudaEventRecord", event, self._stream)

    def elapsed_ms(self, start, end):
        """Time on the device between two events, milliseconds; waits for the second."""
        self._call("cudaEventSynchronize", end)
        found = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(found), start, end)
        return float(found.value)

    def capture(self, work):
        """Make a graph of what `work` gives to the stream; nothing of it runs.

        Raises:
            CudaError: It cannot be captured.
        """
        self._call("cudaStreamBeginCapture", self._stream, ctypes.c_int(THREAD_LOCAL))
        graph, made = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            work()
        finally:
            self._call("cudaStreamEndCapture", self._stream, ctypes.byref(graph))
        self._call("cudaGraphInstantiateWithFlags", ctypes.byref(made), graph, ctypes.c_ulonglong(0))
        self._graph = made

    def launch(self):
        """Give the captured graph to the stream."""
        self._call("cudaGraphLaunch", self._graph, self._stream)

    def _call(self, name, *arguments):
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            said = self._library.cudaGetErrorString(ctypes.c_int(status)) or b"error %d" % status
            # TensorRT's own words for it, which the host tells causes apart by.
            raise CudaError("Cuda Runtime (%s) in %s" % (said.decode("utf-8", "replace"), name))


def _library():
    found = sorted(path for folder in FOLDERS for path in glob.glob("%s/libcudart.so*" % folder))
    for name in list(NAMES) + found[::-1]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError("the CUDA runtime library must be there, found none of %s" % ", ".join(NAMES))
