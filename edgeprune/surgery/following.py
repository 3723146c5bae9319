"""The user's own class at new sizes: attributes that forward reads follow, and a recomputed attention scale is made up for.

Nothing is known of any model: an integer attribute follows when its module's forward reads it, when it has a size that the
plan changes in an operation of that very module, and when the copy then computes what the cut program computes.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, cast

import torch
from torch import nn

from edgeprune.surgery.plan import PruningPlan
from edgeprune.surgery.program_module import FORWARD_ERRORS

log = logging.getLogger("edgeprune.surgery")

ATTEMPTS = 24
"""Most combinations of attributes that are tried: several sizes of one module can be equal before the cut."""

_SORTED = 4096

Change = Callable[[nn.Module], None]


@dataclass(frozen=True)
class _Attribute:
    """One integer that forward reads and that equals a size that changes.

    Attributes:
        path: Of its module.
        name: Of the attribute.
        kind: Class of the module: in all modules of one class an attribute means the same.
        values: What it could become, the likeliest first; what it is now is the last.
    """

    path: str
    name: str
    kind: type
    values: tuple[int, ...]

    def value(self, choice: int) -> int:
        """The value at a choice that was made for all modules of the class."""
        return self.values[min(choice, len(self.values) - 1)]


def followed(
    model: nn.Module,
    cut: nn.Module,
    plan: PruningPlan,
    run: Callable[[nn.Module, Change], None],
    agrees: Callable[[Change], bool],
) -> nn.Module | None:
    """A copy of a cut model whose attributes follow the plan, or None where that does not make it right.

    Args:
        model: What was traced, uncut.
        cut: The same with smaller tensors; it is not touched.
        plan: Whose `rewrites` say which sizes change in which module.
        run: Runs a copy of a model on the plan's inputs, once it is changed by a function.
        agrees: Whether the cut model computes what the cut program computes once it is changed by a function.
    """
    sizes = _sizes(plan.rewrites)
    found = list(_attributes(model, sizes, _integers_read(model, sizes, run)))
    if not found and not any("fold" in item for item in plan.rewrites):
        return None
    for values in islice(_combinations(found), ATTEMPTS):

        def change(twin: nn.Module, values: Mapping[tuple[str, str], int] = values) -> None:
            for (path, name), value in values.items():
                setattr(twin.get_submodule(path), name, value)
            _fold(twin, plan)

        if agrees(change):
            log.info("attributes that follow the plan: %s", ", ".join(sorted({attribute.name for attribute in found})))
            twin = copy.deepcopy(cut)
            change(twin)
            return twin
    return None


def _sizes(rewrites: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, list[int]]]:
    """Module path to size before the cut to sizes after it, in the order in which forward uses them."""
    found: dict[str, dict[int, list[int]]] = {}
    for item in rewrites:
        for name, before in item["from"].items():
            for old, new in _pairs(before, item["to"].get(name)):
                news = found.setdefault(item["module"], {}).setdefault(old, [])
                if new not in news:
                    news.append(new)
    return found


def _pairs(before: Any, after: Any) -> Iterator[tuple[int, int]]:
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for one, other in zip(before, after, strict=True):
            yield from _pairs(one, other)
    elif type(before) is int and isinstance(after, list):
        # `split(64)` is written as a list of sizes after the cut.
        yield from ((before, size) for size in after if type(size) is int and size > 0 and size != before)
    elif type(before) is int and type(after) is int and before != after and before > 0 and after > 0:
        yield before, after


def _integers_read(
    model: nn.Module, paths: Mapping[str, Any], run: Callable[[nn.Module, Change], None]
) -> dict[str, set[str]]:
    """Module path to the names of integer attributes that one forward reads."""
    read: dict[str, set[str]] = {path: set() for path in paths}

    def watch(twin: nn.Module) -> None:
        for path, names in read.items():
            module = twin.get_submodule(path)
            module.__class__ = _watched(type(module), names)

    try:
        run(model, watch)
    except FORWARD_ERRORS as error:
        log.debug("which attributes forward reads cannot be seen: %s", error)
        return {}
    return read


def _watched(kind: type, names: set[str]) -> type:
    """A subclass that writes down which integers are read."""

    def read(self: Any, name: str) -> Any:
        value = super(watched, self).__getattribute__(name)
        if type(value) is int:
            names.add(name)
        return value

    watched: Any = type(kind.__name__, (kind,), {"__getattribute__": read})
    return cast(type, watched)


def _attributes(
    model: nn.Module, sizes: Mapping[str, Mapping[int, Sequence[int]]], read: Mapping[str, set[str]]
) -> Iterator[_Attribute]:
    for path, names in read.items():
        module = model.get_submodule(path)
        for name in sorted(names):
            value = vars(module).get(name)
            if type(value) is int and value in sizes[path]:
                yield _Attribute(path, name, type(module), (*sizes[path][value], value))


def _combinations(attributes: Sequence[_Attribute]) -> Iterator[dict[tuple[str, str], int]]:
    """Values of all attributes, the likeliest combination first."""
    choices: dict[tuple[type, str], int] = {}
    for attribute in attributes:
        key = (attribute.kind, attribute.name)
        choices[key] = max(choices.get(key, 0), len(attribute.values))
    # The first of many is all that is likely; of a few, those with the fewest second thoughts come first.
    many = math.prod(choices.values()) > _SORTED
    every = product(*map(range, choices.values()))
    for chosen in every if many else sorted(every, key=lambda places: (sum(places), places)):
        choice = dict(zip(choices, chosen, strict=True))
        yield {
            (attribute.path, attribute.name): attribute.value(choice[attribute.kind, attribute.name])
            for attribute in attributes
        }


def _fold(module: nn.Module, plan: PruningPlan) -> None:
    """Scale what makes the queries, where forward takes the scale from the head dimension that is left."""
    named = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for item in plan.rewrites:
            fold = item.get("fold", {"rows": {}})
            for name in fold["rows"].keys() & named.keys():
                rows = set(fold["rows"][name])
                stays = plan.kept.get(name, {}).get(0, range(len(named[name])))
                at = torch.tensor([place for place, row in enumerate(stays) if row in rows], dtype=torch.long)
                named[name][at.to(named[name].device)] *= fold["factor"]
