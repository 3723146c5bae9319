"""A stand-in for CUDA's runtime library as `ctypes` opens it, for boards without a GPU.

It has the functions that edgeprune calls, with the arguments that they have, and no others. Memory of the device is memory of
this process, and a stream runs what it is given at once; what is captured waits for its graph.

Source: NVIDIA, CUDA Runtime API: Device, Stream, Event, Memory and Graph Management, and the numbers of cudaError_t.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any


class Cudart:
    """CUDA's runtime library as `ctypes` opens it: memory of the device is memory of this process, and a stream runs at once."""

    _INVALID, _CAPTURE = 1, 901
    _KINDS = (1, 2)

    def __init__(self) -> None:
        self._memory: dict[int, Any] = {}
        self._events: dict[int, float] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._capturing: list[Callable[[], None]] | None = None
        self._handles = iter(range(1, 1 << 30))
        self._streams: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"libcudart.so: undefined symbol: {name}")

    def enqueue(self, stream: int, work: Callable[[], None]) -> bool:
        """What an execution context does: give work to a stream."""
        if stream not in self._streams:
            return False
        if self._capturing is not None:
            self._capturing.append(work)
        else:
            work()
        return True

    def read(self, address: int, size: int) -> bytes:
        assert self._holds(address, size)
        return ctypes.string_at(address, size)

    def write(self, address: int, content: bytes) -> None:
        assert self._holds(address, len(content))
        ctypes.memmove(address, content, len(content))

    def _holds(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + len(block) for start, block in self._memory.items())

    @property
    def cudaSetDevice(self) -> Any:  # noqa: N802 - as the library calls it
        return _function(lambda device: 0 if device.value == 0 else 101)

    @property
    def cudaSetDeviceFlags(self) -> Any:  # noqa: N802
        # cudaErrorSetOnActiveProcess: an engine was loaded before.
        return _function(lambda flags: 708)

    @property
    def cudaGetErrorString(self) -> Any:  # noqa: N802
        said = {
            self._INVALID: b"invalid argument",
            self._CAPTURE: b"operation failed due to a previous error during capture",
        }
        return _function(lambda status: said.get(status.value, b"invalid device ordinal"))

    @property
    def cudaStreamCreate(self) -> Any:  # noqa: N802
        def create(stream: Any) -> int:
            stream._obj.value = next(self._handles)
            self._streams.add(stream._obj.value)
            return 0

        return _function(create)

    @property
    def cudaStreamSynchronize(self) -> Any:  # noqa: N802
        return _function(lambda stream: self._CAPTURE if self._capturing is not None else 0)

    @property
    def cudaMalloc(self) -> Any:  # noqa: N802
        def allocate(address: Any, size: Any) -> int:
            block = ctypes.create_string_buffer(size.value)
            address._obj.value = ctypes.addressof(block)
            self._memory[ctypes.addressof(block)] = block
            return 0

        return _function(allocate)

    @property
    def cudaMemcpy(self) -> Any:  # noqa: N802
        def copy(target: Any, source: Any, size: Any, kind: Any) -> int:
            places = [int(ctypes.cast(place, ctypes.c_void_p).value or 0) for place in (target, source)]
            on_device = places[0] if kind.value == 1 else places[1]
            if kind.value not in self._KINDS or not self._holds(on_device, size.value):
                return self._INVALID
            ctypes.memmove(places[0], places[1], size.value)
            return 0

        return _function(copy)

    @property
    def cudaEventCreateWithFlags(self) -> Any:  # noqa: N802
        def create(event: Any, flags: Any) -> int:
            # Default, blocking sync, without timing, and the two together.
            if flags.value not in range(4):
                return self._INVALID
            event._obj.value = next(self._handles)
            return 0

        return _function(create)

    @property
    def cudaEventRecord(self) -> Any:  # noqa: N802
        def record(event: Any, stream: Any) -> int:
            self._events[event.value] = time.perf_counter()
            return 0 if stream.value in self._streams else self._INVALID

        return _function(record)

    @property
    def cudaEventSynchronize(self) -> Any:  # noqa: N802
        return _function(lambda event: 0 if event.value in self._events else self._INVALID)

    @property
    def cudaEventElapsedTime(self) -> Any:  # noqa: N802
        def elapsed(found: Any, start: Any, end: Any) -> int:
            found._obj.value = 1e3 * (self._events[end.value] - self._events[start.value])
            return 0

        return _function(elapsed)

    @property
    def cudaStreamBeginCapture(self) -> Any:  # noqa: N802
        def begin(stream: Any, mode: Any) -> int:
            self._capturing = []
            return 0

        return _function(begin)

    @property
    def cudaStreamEndCapture(self) -> Any:  # noqa: N802
        def end(stream: Any, graph: Any) -> int:
            graph._obj.value = next(self._handles)
            self._graphs[graph._obj.value], self._capturing = self._capturing or [], None
            return 0

        return _function(end)

    @property
    def cudaGraphInstantiateWithFlags(self) -> Any:  # noqa: N802
        def instantiate(made: Any, graph: Any, flags: Any) -> int:
            made._obj.value = next(self._handles)
            self._graphs[made._obj.value] = self._graphs[graph.value]
            return 0

        return _function(instantiate)

    @property
    def cudaGraphLaunch(self) -> Any:  # noqa: N802
        def launch(graph: Any, stream: Any) -> int:
            for work in self._graphs[graph.value]:
                work()
            return 0

        return _function(launch)


def _function(body: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a library: it has its own `restype`."""

    def call(*arguments: Any) -> Any:
        return body(*arguments)

    return call


def found_by_ctypes(cuda: Cudart) -> None:
    """Have `ctypes` find the library, as a loader does on a board that has it."""
    opened = ctypes.CDLL

    def find(name: Any, *arguments: Any, **keywords: Any) -> Any:
        return cuda if "libcudart" in str(name) else opened(name, *arguments, **keywords)

    ctypes.CDLL = find  # type: ignore[misc,assignment]
