"""ONNX Runtime, imported without its telemetry.

Its import alone (seen with 1.31.1) starts a telemetry client, which writes an identity of the device and a database of events
below ``~/.cache/Microsoft/DeveloperTools/.onnxruntime``; ``disable_telemetry_events`` comes too late for that. The environment
variable that keeps it from starting is read at the import, so it is set no longer than that, and never over the user's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "ORT_DISABLE_TELEMETRY"


@contextmanager
def _without_telemetry() -> Iterator[None]:
    if VARIABLE in os.environ:
        yield
        return
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        del os.environ[VARIABLE]


with _without_telemetry():
    import onnxruntime

__all__ = ["onnxruntime"]
