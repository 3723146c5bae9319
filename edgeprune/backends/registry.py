"""The table of backends: one line each; third parties add theirs through the entry point group `edgeprune.backends`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from edgeprune.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from edgeprune.backends._base import Backend

BACKENDS = {
    "onnxruntime": "edgeprune.backends.onnxruntime.backend:OnnxRuntime",
}


def names() -> list[str]:
    """Names of all backends, the built-in ones first."""
    return [*BACKENDS, *sorted(point.name for point in entry_points(group="edgeprune.backends"))]


def get(name: str | Backend) -> Backend:
    """The backend of that name; a backend is returned as it is.

    Raises:
        ConfigError: There is no such backend.
        BackendUnavailableError: It is there, but the host lacks what it needs; the hint is the install command.
    """
    backend = _load(name) if isinstance(name, str) else name
    reason = backend.availability()
    if reason is not None:
        raise BackendUnavailableError(
            f"backend {backend.name} must be installed on this host, {reason}.", hint=backend.install
        )
    return backend


def describe() -> list[tuple[str, str | None, str]]:
    """(name, why it cannot be used here or None, install command) of every backend; none is hidden."""
    return [(name, backend.availability(), backend.install) for name in names() for backend in [_load(name)]]


def _load(name: str) -> Backend:
    target = BACKENDS.get(name)
    if target is not None:
        module, _, attribute = target.partition(":")
        backend: Backend = getattr(import_module(module), attribute)()
        return backend
    for point in entry_points(group="edgeprune.backends"):
        if point.name == name:
            plugin: Backend = point.load()()
            return plugin
    raise ConfigError(f"a backend must be one of {', '.join(names())}, found {name!r}.")
