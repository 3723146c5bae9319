"""The table of backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.errors import BackendUnavailableError
from edgeprune.extensions import Extensions

if TYPE_CHECKING:
    from edgeprune.backends._base import Backend

BACKENDS: Extensions[Backend] = Extensions(
    "a backend",
    "edgeprune.backends",
    {
        "onnxruntime": "edgeprune.backends.onnxruntime.backend:OnnxRuntime",
        "tvm": "edgeprune.backends.tvm.backend:Tvm",
        "tensorrt": "edgeprune.backends.tensorrt.backend:TensorRt",
    },
)
names = BACKENDS.names


def get(name: str | Backend) -> Backend:
    """The backend of that name; a backend is returned as it is.

    Raises:
        ConfigError: There is no such backend.
        BackendUnavailableError: It is there, but the host lacks what it needs; the hint is the install command.
    """
    backend = BACKENDS.make(name)
    reason = backend.availability()
    if reason is not None:
        raise BackendUnavailableError(
            f"backend {backend.name} must be installed on this host, {reason}.", hint=backend.install
        )
    return backend


def describe() -> list[tuple[str, str | None, str]]:
    """(name, why it cannot be used here or None, install command) of every backend; none is hidden."""
    backends = [BACKENDS.make(name) for name in names()]
    return [(backend.name, backend.availability(), backend.install) for backend in backends]
