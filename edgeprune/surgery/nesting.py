"""How inputs and outputs are nested, read from text without importing what the text names."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

from torch.utils import _pytree as pytree

from edgeprune.errors import PlanError


def read_nesting(text: Any) -> pytree.TreeSpec:
    """The nesting that ``torch.utils._pytree.treespec_dumps`` wrote, of tuples, lists and dicts alone.

    Raises:
        PlanError: If the text is damaged or names another type.
    """
    try:
        _, written = json.loads(text)
        example = _example(written)
    except PlanError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PlanError(f"a program must say how inputs and outputs are nested, found {text!r}.") from error
    return pytree.tree_flatten(example)[1]


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
    if kind in ("builtins.dict", "collections.OrderedDict"):
        pairs = zip(json.loads(context), children, strict=True)
        return dict(pairs) if kind == "builtins.dict" else OrderedDict(pairs)
    raise PlanError(f"inputs and outputs of a program must be tuples, lists and dicts of tensors, found {kind}.")
