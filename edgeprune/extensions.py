"""Tables of what can be extended: built-ins by name, one line each, and those of third parties through entry points."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from edgeprune.errors import ConfigError

T = TypeVar("T")


class Extensions(Generic[T]):
    """Everything of one kind. A name's module is imported when it is made, not before.

    Args:
        what: What one of them is called in messages, with its article, e.g. ``"a criterion"``.
        group: Entry point group of third parties, e.g. ``"edgeprune.criteria"``.
        builtin: Name to ``"module:class"``.
    """

    def __init__(self, what: str, group: str, builtin: Mapping[str, str]) -> None:
        self.what, self.group, self.builtin = what, group, dict(builtin)

    def names(self) -> list[str]:
        """All names, the built-in ones first."""
        return [*self.builtin, *sorted(point.name for point in self._plugins())]

    def make(self, name: str | T, **options: Any) -> T:
        """The one of that name, made with `options`; an object is returned as it is.

        Raises:
            ConfigError: There is none of that name.
        """
        if not isinstance(name, str):
            return name
        found: T
        if name in self.builtin:
            module, _, attribute = self.builtin[name].partition(":")
            found = getattr(import_module(module), attribute)(**options)
            return found
        for point in self._plugins():
            if point.name == name:
                found = point.load()(**options)
                return found
        names = self.names()
        near = difflib.get_close_matches(name, names, n=1) or names[:1]
        raise ConfigError(
            f"{self.what} must be one of {', '.join(names)}, found {name!r}.", hint=near[0] if near else None
        )

    def _plugins(self) -> Iterator[EntryPoint]:
        return iter(entry_points(group=self.group))
