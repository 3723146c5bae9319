"""How inputs and outputs are nested: classes that torch does not know; reading it from text, importing nothing that it names."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from edgeprune.errors import PlanError


class NamedOutput(OrderedDict[str, Any]):
    """Outputs by name, in place of a class that this process has not imported: ``out.logits``, ``out["logits"]``, ``out[0]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"outputs are {', '.join(self)}, found no {name!r}") from None

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


def make_known(value: Any) -> None:
    """Tell torch how dataclasses and named tuples among nested values are taken apart, and what to call them in text.

    What was registered before stays as it is.
    """
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    children: Iterable[Any] = ()
    if pytree.is_namedtuple_instance(value):
        if kind not in pytree.SUPPORTED_SERIALIZED_TYPES:
            pytree._register_namedtuple(kind, serialized_type_name=name)
        children = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        if kind not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(kind, serialized_type_name=name)
        children = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        children = value.values()
    elif isinstance(value, list | tuple):
        children = value
    for child in children:
        make_known(child)


def read_nesting(text: Any) -> pytree.TreeSpec:
    """The nesting that ``torch.utils._pytree.treespec_dumps`` wrote, of tuples, lists, dicts and classes with named fields.

    A class is used as it is where this process has already imported and registered it; otherwise a `NamedOutput` stands in.

    Raises:
        PlanError: If the text is damaged or names a type without named fields.
    """
    if NamedOutput not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            NamedOutput, _values_and_names, _named, serialized_type_name="edgeprune.NamedOutput"
        )
    try:
        _, written = json.loads(text)
        example = _example(written)
    except PlanError:
        raise
    except (ValueError, TypeError, LookupError, RecursionError, AttributeError, AssertionError) as error:
        # Also a class of the user's that cannot be made of zeros.
        raise PlanError(f"a program must say how inputs and outputs are nested, found {text!r}.") from error
    return pytree.tree_flatten(example)[1]


def _values_and_names(output: NamedOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _named(values: Iterable[Any], names: Any) -> NamedOutput:
    return NamedOutput(zip(names, values, strict=True))


def _example(written: dict[str, Any]) -> Any:
    """A value that is nested as written, with zeros for leaves."""
    kind, context, children = (
        written["type"],
        written["context"],
        [_example(child) for child in written["children_spec"]],
    )
    if kind is None:
        return 0
    if kind == "builtins.tuple":
        return tuple(children)
    if kind == "builtins.list":
        return children
    if kind == "collections.namedtuple":
        named = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(context)
        fits = named is not None and len(getattr(named, "_fields", ())) == len(children)
        return named(*children) if named is not None and fits else tuple(children)
    if kind in ("builtins.dict", "collections.OrderedDict"):
        pairs = zip(json.loads(context), children, strict=True)
        return dict(pairs) if kind == "builtins.dict" else OrderedDict(pairs)
    names = _field_names(context)
    if names is None or len(names) != len(children):
        raise PlanError(
            f"inputs and outputs of a program must be tuples, lists, dicts and classes with named fields, found {kind}."
        )
    known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(kind)
    if known is not None and known in pytree.SUPPORTED_NODES:
        return pytree.SUPPORTED_NODES[known].unflatten_fn(children, json.loads(context))
    return NamedOutput(zip(names, children, strict=True))


def _field_names(context: Any) -> list[str] | None:
    """Names of the fields with a value: a list of them (model outputs), or one of those with and one of those without."""
    found = json.loads(context) if isinstance(context, str) else None
    if isinstance(found, list) and len(found) == 2 and all(isinstance(part, list) for part in found):
        found = found[0]
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return found
    return None
