"""A cut model beside which others are computed: only the operations that differ, and what depends on those."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgeprune.surgery.program_steps import names_in

if TYPE_CHECKING:
    from edgeprune.surgery.program_module import ProgramModule

MOST_BYTES = 2**30
"""Activations of one model that are kept at most."""

Key = tuple[int, ...]
"""A batch, by the identity of its tensors, which must stay where they are."""
Values = Mapping[str, Any]


class Beside:
    """The model, and its values on the batches that it was run on.

    Kept are those from which the others go on: what their other operations read of the common ones. A model that differs in one
    head needs nothing of the trunk and of the other heads again.

    Args:
        module: The model, no operation of which works in place (`ProgramModule.works_in_place`).
        others: Some of those that will be computed beside it; for further ones more is computed than need be.
        form: Puts it into the form in which it is to be run.
        most_bytes: Values that are kept at most; batches beyond are computed whole each time.
    """

    def __init__(
        self,
        module: ProgramModule,
        others: Iterable[ProgramModule],
        form: Callable[[nn.Module], AbstractContextManager[Any]],
        most_bytes: int,
    ) -> None:
        self.module, self.form, self.most_bytes = module, form, most_bytes
        made = {node["name"] for node in module.program["nodes"]}
        outputs = made.intersection(names_in(module.program["outputs"]))
        self.wanted = outputs.union(*(self._read_by_changed(one) for one in others))
        self._values: dict[Key, dict[str, Any]] = {}
        self._size_bytes, self._full = 0, False

    def model(self, other: ProgramModule) -> Cut:
        """What computes another model on batches that this one was run on, for less."""
        return Cut(self, other)

    def take(self, cut: Cut) -> None:
        """Another model takes the place of this one, with what is known of its values."""
        known = {key: {**self._values[key], **found} for key, found in cut.found.items() if key in self._values}
        self.module, self._values = cut.module, known
        self._size_bytes, self._full = sum(_size_bytes(values) for values in known.values()), False

    def known(self, key: Key, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        """Values for a batch: of inputs, and of this model as far as they are kept.

        Args:
            key: The batch.
            args: Its inputs.
            kwargs: The same.
            own: Whether they are asked for by what is about to compute this model anyway.
        """
        if key in self._values:
            return self._values[key]
        inputs = self.module.begun(0, *args, **kwargs)
        if own or self._full:
            return inputs
        with self.form(self.module):
            _, found = self.module.again(inputs, self.module.operations, self.wanted)
        self.keep(key, inputs, found)
        return {**inputs, **found}

    def keep(self, key: Key, inputs: Values, found: Values) -> None:
        """Keep this model's values for a batch, where there is room."""
        size_bytes = _size_bytes(found)
        self._full = self._full or self._size_bytes + size_bytes > self.most_bytes
        if not self._full:
            self._values[key] = {**inputs, **found}
            self._size_bytes += size_bytes

    def _read_by_changed(self, other: ProgramModule) -> frozenset[str]:
        """What another model reads of values that are the same here."""
        differing = self.module.differing(other)
        if differing is None:
            return frozenset()
        program = other.program
        changed = behind(program, differing)
        read = [name for node in program["nodes"] if node["name"] in changed for name in names_in(node["args"])]
        made = {node["name"] for node in program["nodes"]}
        return frozenset(made.intersection(read) - changed)


class Cut(nn.Module):
    """A model that is computed beside another one; made by `Beside.model`.

    Attributes:
        found: By batch, its values that are not those of the other.
    """

    def __init__(self, beside: Beside, module: ProgramModule) -> None:
        super().__init__()
        self.module, self._beside = module, beside
        self.found: dict[Key, dict[str, Any]] = {}
        self._size_bytes = 0
        differing = frozenset[str]() if module is beside.module else beside.module.differing(module)
        self._changed = None if differing is None else behind(module.program, differing)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        key = tuple(id(leaf) for leaf in pytree.tree_leaves((args, kwargs)))
        beside, own = self._beside, self.module is self._beside.module
        if self._changed is None:
            return self.module(*args, **kwargs)
        known = beside.known(key, args, kwargs, own=own)
        operations = to_run(self.module.program, self._changed, known)
        outputs, found = self.module.again(known, operations, beside.wanted)
        if own:
            if operations:
                beside.keep(key, known, found)
            return outputs
        size_bytes = _size_bytes(found)
        if self._size_bytes + size_bytes <= beside.most_bytes:
            self.found[key] = {name: value for name, value in found.items() if name in self._changed}
            self._size_bytes += size_bytes
        return outputs


def behind(program: Mapping[str, Any], differing: Collection[str]) -> frozenset[str]:
    """Some operations of a written program, and all that depend on them, by name."""
    found: set[str] = set()
    for node in program["nodes"]:
        if node["name"] in differing or not found.isdisjoint(names_in(node["args"])):
            found.add(node["name"])
    return frozenset(found)


def to_run(program: Mapping[str, Any], changed: Collection[str], known: Collection[str]) -> frozenset[str]:
    """Operations that give the outputs where some values are known.

    Args:
        program: As it is written.
        changed: What is computed in any case.
        known: Values that are there, besides the tensors of the model; those that changed do not count.
    """
    reads = {node["name"]: names_in(node["args"]) for node in program["nodes"]}
    found: set[str] = set()
    left = [*changed, *names_in(program["outputs"])]
    while left:
        name = left.pop()
        if name in found or name not in reads or (name in known and name not in changed):
            continue
        found.add(name)
        left += reads[name]
    return frozenset(found)


def _size_bytes(values: Values) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(dict(values)) if isinstance(leaf, torch.Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)
