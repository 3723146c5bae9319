"""The table of allocators: one line each; third parties add theirs through the entry point group `edgeprune.allocation`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.allocation._base import Allocator

ALLOCATORS = {
    "greedy": "edgeprune.allocation.greedy:Greedy",
    "uniform": "edgeprune.allocation.uniform:Uniform",
}


def names() -> list[str]:
    """Names of all allocators, the built-in ones first."""
    return [*ALLOCATORS, *sorted(point.name for point in entry_points(group="edgeprune.allocation"))]


def get(name: str | Allocator, **options: Any) -> Allocator:
    """The allocator of that name, made with `options`; an allocator is returned as it is.

    Raises:
        ConfigError: There is no such allocator.
    """
    if not isinstance(name, str):
        return name
    target = ALLOCATORS.get(name)
    if target is not None:
        module, _, attribute = target.partition(":")
        allocator: Allocator = getattr(import_module(module), attribute)(**options)
        return allocator
    for point in entry_points(group="edgeprune.allocation"):
        if point.name == name:
            plugin: Allocator = point.load()(**options)
            return plugin
    raise ConfigError(f"an allocator must be one of {', '.join(names())}, found {name!r}.")
