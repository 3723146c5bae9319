"""The table of criteria: one line each; third parties add theirs through the entry point group `edgeprune.criteria`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.criteria._base import Criterion

CRITERIA = {
    "l2": "edgeprune.criteria.l2:L2",
    "taylor": "edgeprune.criteria.taylor:Taylor",
    "bn_scale": "edgeprune.criteria.bn_scale:BnScale",
    "random": "edgeprune.criteria.random:Random",
}


def names() -> list[str]:
    """Names of all criteria, the built-in ones first."""
    return [*CRITERIA, *sorted(point.name for point in entry_points(group="edgeprune.criteria"))]


def get(name: str | Criterion, **options: Any) -> Criterion:
    """The criterion of that name, made with `options`; a criterion is returned as it is.

    Raises:
        ConfigError: There is no such criterion.
    """
    if not isinstance(name, str):
        return name
    target = CRITERIA.get(name)
    if target is not None:
        module, _, attribute = target.partition(":")
        criterion: Criterion = getattr(import_module(module), attribute)(**options)
        return criterion
    for point in entry_points(group="edgeprune.criteria"):
        if point.name == name:
            plugin: Criterion = point.load()(**options)
            return plugin
    raise ConfigError(f"a criterion must be one of {', '.join(names())}, found {name!r}.")
