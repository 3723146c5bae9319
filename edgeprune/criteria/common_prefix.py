"""Cut models that begin alike: what their first operations have in common is computed once, to the same bits.

Models around one plan differ from it in one layer each. All that lies before that layer is the plan's own, so each needs only
the operations behind it: on the average over the layers of a network, half of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from edgeprune.tasks.batches import call

if TYPE_CHECKING:
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.surgery.program_module import ProgramModule

Key = TypeVar("Key", bound=Hashable)

MOST_BYTES = 2**30
"""Activations that are kept at most; batches beyond are computed from the start."""


def common_operations(one: PruningPlan, other: PruningPlan) -> int:
    """How many of the first operations compute the same in the cut programs of two plans of one model.

    Args:
        one: A plan whose program is written down.
        other: Another one.
    """
    assert one.program is not None
    assert other.program is not None
    targets = {item["name"]: item["target"] for item in one.program["inputs"]}
    pairs = zip(one.program["nodes"], other.program["nodes"], strict=False)
    count = 0
    for own, another in pairs:
        cut = {targets[name] for name in read_by(own["args"]) if name in targets}
        if own != another or any(one.kept.get(name) != other.kept.get(name) for name in cut):
            break
        count += 1
    return count


def needed_behind(program: Mapping[str, Any], count: int) -> frozenset[str]:
    """Names of values that operations from the `count`-th on, or the outputs, read."""
    nodes = program["nodes"][count:]
    return frozenset([*(name for node in nodes for name in read_by(node["args"])), *read_by(program["outputs"])])


def made_before(program: Mapping[str, Any], count: int) -> frozenset[str]:
    """Names of inputs, weights, and values of operations before the `count`-th."""
    return frozenset(item["name"] for item in (*program["inputs"], *program["nodes"][:count]))


def first_reader(program: Mapping[str, Any], tensors: Collection[str]) -> int:
    """How many operations there are before the first that reads one of some parameters or buffers."""
    names = {item["name"] for item in program["inputs"] if item["target"] in tensors}
    places = (place for place, node in enumerate(program["nodes"]) if not names.isdisjoint(read_by(node["args"])))
    return next(places, len(program["nodes"]))


def read_by(value: Any) -> Iterator[str]:
    """Names of the values among the arguments of a written operation."""
    if isinstance(value, list):
        for item in value:
            yield from read_by(item)
    elif isinstance(value, dict):
        if set(value) == {"node"}:
            yield value["node"]
        else:
            for item in value.values():
                yield from read_by(item)


def models_beside(
    own: PruningPlan,
    others: Mapping[Key, PruningPlan],
    make: Callable[[PruningPlan], ProgramModule],
    batches: Sequence[Any],
    form: Callable[[ProgramModule], AbstractContextManager[Any]],
) -> Iterator[tuple[Key, Callable[[int], Any]]]:
    """Models of many plans, each with what gives its outputs for a batch by its number; nearest to the input first.

    Only two models and the activations that are still needed are in memory at once.

    Args:
        own: A plan that the others are like but for a few operations.
        others: Theirs; of all, the program is written down.
        make: The model of a plan.
        batches: Inputs of each, as `edgeprune.tasks.batches.call` takes them.
        form: Puts a model into the form in which it is to be run.
    """
    assert own.program is not None
    common = {key: common_operations(own, plan) for key, plan in others.items()}
    needed = {
        key: needed_behind(plan.program or {}, common[key]) & made_before(own.program, common[key])
        for key, plan in others.items()
    }
    prefix = None
    with ExitStack() as stack:
        left = sorted(others, key=lambda key: common[key])
        for place, key in enumerate(left):
            if prefix is None and common[key] > 0:
                first = make(own)
                stack.enter_context(form(first))
                prefix = Prefix(first, batches, MOST_BYTES)
            module = make(others[key])
            with form(module):
                if prefix is None:
                    yield key, partial(_whole, module, batches)
                else:
                    prefix.advance(common[key], frozenset[str]().union(*(needed[one] for one in left[place:])))
                    yield key, partial(prefix.outputs, module)


def _whole(module: ProgramModule, batches: Sequence[Any], batch: int) -> Any:
    with torch.no_grad():
        return call(module, batches[batch])


class Prefix:
    """The first operations of a cut model on some batches; they are run on from where they are, never again.

    Args:
        module: The model, as it is to be run: in eval form, and however its batch norms normalize.
        batches: Inputs of each, as `edgeprune.tasks.batches.call` takes them.
        most_bytes: Activations that are kept at most.

    Attributes:
        module: The model.
        count: How many operations have been run.
    """

    def __init__(self, module: ProgramModule, batches: Sequence[Any], most_bytes: int) -> None:
        self.module, self._batches, self._most_bytes = module, batches, most_bytes
        self.count = 0
        self._values: dict[int, dict[str, Any]] = {}
        for place, inputs in enumerate(batches):
            args, keywords = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
            args = args if isinstance(args, tuple | list) else (args,)
            # An operation that works in place must not reach what others were given.
            with torch.no_grad():
                self._values[place] = self._own(module.begun(0, *args, **keywords))
        self._forget()

    def advance(self, count: int, needed: Collection[str] = ()) -> None:
        """Run up to the `count`-th operation.

        Args:
            count: At least as many as before.
            needed: Values that models going on from here, or from a later operation, still read, besides those that this
                model reads itself.
        """
        kept = needed_behind(self.module.program, count).union(needed)
        for place, values in self._values.items():
            with torch.no_grad():
                found = self.module.advanced(values, self.count, count, kept)
            self._values[place] = {name: value for name, value in found.items() if name in kept}
        self.count = count
        self._forget()

    def outputs(self, other: ProgramModule, batch: int) -> Any:
        """What a model returns for a batch whose first operations are these.

        Args:
            other: The model, in the form that this one has.
            batch: Which.
        """
        with torch.no_grad():
            if batch not in self._values:
                return call(other, self._batches[batch])
            return other.finished(self._own(self._values[batch]), self.count)

    def _own(self, values: dict[str, Any]) -> dict[str, Any]:
        # As a whole: views of one tensor stay views of one tensor.
        return copy.deepcopy(values) if self.module.works_in_place else values

    def _forget(self) -> None:
        """Throw away what is too much."""
        size_bytes = 0
        for place, values in list(self._values.items()):
            leaves = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
            size_bytes += sum(leaf.numel() * leaf.element_size() for leaf in leaves)
            if size_bytes > self._most_bytes:
                del self._values[place]
