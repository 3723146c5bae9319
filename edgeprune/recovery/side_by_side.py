"""The dense and the cut program run side by side, operation by operation, over all calibration batches.

So whatever is changed in the cut model at one operation is what all later ones see. Values of as many batches as fit into a
bound are kept from one operation to the next; the others are computed anew from their inputs wherever they are looked at, with
the changes made so far, which comes to the same bits. Behind the first layers activations are mostly small, and all fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from edgeprune.errors import ReconstructionError
from edgeprune.graph.rules._base import named_arguments

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_COPY = "aten.clone.default"

Values = dict[str, Any]
"""Of one batch, by the names of operations and inputs."""


class Look(Protocol):
    """What is done at one operation, before it runs."""

    def take(self, batch: int) -> None:
        """Look at a batch, whose values both sides hold meanwhile."""

    def finish(self) -> None:
        """All batches were looked at; the cut side may be changed."""


class Side:
    """One program with its weights, and the values of one batch at a time that are still needed.

    Args:
        program: In eval form.
        tensors: Parameters and buffers by name.

    Attributes:
        nodes: The program's operations and inputs, in order.
        targets: Placeholder to the name of the parameter or buffer that it is.
    """

    def __init__(self, program: ExportedProgram, tensors: Mapping[str, torch.Tensor]) -> None:
        self.nodes: list[Node] = list(program.graph.nodes)
        self.targets: dict[str, str] = {}
        self._inputs: list[str] = []
        self._fixed: dict[str, Any] = {}
        self._values: Values = {}
        self._known: set[str] = set()
        for spec in program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                self._inputs.append(spec.arg.name)
                continue
            name = str(spec.target)
            self.targets[spec.arg.name] = name
            self._fixed[spec.arg.name] = tensors[name] if name in tensors else program.constants[name]
        self._known.update(self._inputs)

    def begin(self, leaves: Sequence[Any]) -> Values:
        """Values of a batch to begin with, which are looked at from now on: copies, for a program may write to its inputs."""
        copies = (leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        self.look_at(dict(zip(self._inputs, copies, strict=True)))
        return self._values

    def look_at(self, values: Values) -> None:
        """Go on with another batch."""
        self._values = values

    def fixed(self, node: Node) -> torch.Tensor:
        """A parameter, a buffer, or what is computed of those alone."""
        found: torch.Tensor = self._fixed[node.name]
        return found

    def replace(self, node: Node, value: torch.Tensor) -> None:
        """Change a parameter or buffer for all operations that are still to run."""
        self._fixed[node.name] = value

    def has(self, node: Node) -> bool:
        """Whether a value of the batches has been computed, and not been thrown away yet."""
        return node.name in self._known

    def of(self, node: Node) -> Any:
        """A node's value for the batch that is looked at."""
        return self._values[node.name]

    def arguments(self, node: Node) -> dict[str, Any]:
        """Arguments of an operation by name, for the batch that is looked at."""
        named: dict[str, Any] = map_arg(named_arguments(node), self._value)
        return named

    def reads_batches(self, node: Node) -> bool:
        """Whether an operation that is run next depends on the inputs."""
        return any(one.name in self._known for one in node.all_input_nodes)

    def run(self, node: Node) -> None:
        """Compute an operation, for the batch that is looked at, or for all where it reads nothing of a batch."""
        args, kwargs = map_arg((node.args, node.kwargs), self._value)
        reads = any(one.name in self._values for one in node.all_input_nodes)
        values = self._values if reads else self._fixed
        values[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]

    def passed(self, node: Node, gone: Iterable[str]) -> None:
        """An operation was run for all batches, and some values are needed no more."""
        if self.reads_batches(node):
            self._known.add(node.name)
        self._known.difference_update(gone)

    def _value(self, node: Node) -> Any:
        return self._values[node.name] if node.name in self._values else self._fixed[node.name]


class SideBySide:
    """Both programs over all batches.

    Args:
        dense: The dense model.
        cut: The cut one.
        batches: Flat inputs per batch; both get the same.
        most_bytes: Values that are kept from one operation to the next at most, in bytes; those of one batch come on top.
        removed: Operations of the dense program that the cut one does not have.

    Raises:
        ReconstructionError: The two programs are not made of the same operations.
    """

    def __init__(
        self,
        dense: Side,
        cut: Side,
        batches: Sequence[Sequence[Any]],
        *,
        most_bytes: int,
        removed: Collection[str] = (),
    ) -> None:
        self._dense, self._cut, self._batches, self._most_bytes = dense, cut, batches, most_bytes
        self._calls = [node for node in dense.nodes if node.op == "call_function"]
        there = [node for node in self._calls if node.name not in removed]
        calls_cut = [node for node in cut.nodes if node.op == "call_function"]
        self._partner = dict(zip(there, calls_cut, strict=False))
        self._copies = {one for one, two in self._partner.items() if removed and str(two.target) == _COPY}
        if len(there) != len(calls_cut) or any(
            str(one.target) != str(two.target) and one not in self._copies for one, two in self._partner.items()
        ):
            raise ReconstructionError(
                "the cut model must run the operations of the dense one to be reconstructed, found others.",
                hint="fine-tuning, without reconstruction",
            )
        last = {name: place for place, node in enumerate(self._calls) for name in _read(node)}
        last_cut = {
            name: place
            for place, node in enumerate(self._calls)
            if node in self._partner
            for name in _read(self._partner[node])
        }
        self._steps = [self._step(place, last, last_cut) for place in range(len(self._calls))]
        self._held: dict[int, tuple[Values, Values]] = {}
        self._held_bytes: dict[int, int] = {}

    def run(
        self, looks: Callable[[Node, Node], Look | None], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Run both; before each operation of both its batches are looked at.

        Where something was removed, a sum or what followed it may be a copy in the cut program; those are not looked at.

        Args:
            looks: Called with (dense node, cut node); None where there is nothing to look at.
            progress: Called with (operations done, in all).
        """
        with torch.no_grad():
            for place, (one, two, gone, gone_cut) in enumerate(self._steps):
                look = looks(one, two) if two is not None and one not in self._copies else None
                if look is not None:
                    for batch in range(len(self._batches)):
                        self._hold(batch, place)
                        look.take(batch)
                        self._keep(batch)
                    look.finish()
                self._pass(place)
                self._dense.passed(one, gone)
                if two is not None:
                    self._cut.passed(two, gone_cut)
                if progress is not None:
                    progress(place + 1, len(self._steps))

    def _step(
        self, place: int, last: Mapping[str, int], last_cut: Mapping[str, int]
    ) -> tuple[Node, Node | None, tuple[str, ...], tuple[str, ...]]:
        one = self._calls[place]
        two = self._partner.get(one)
        gone = tuple(name for name in (*_read(one), one.name) if last.get(name, -1) <= place)
        if two is None:
            return one, None, gone, ()
        return one, two, gone, tuple(name for name in (*_read(two), two.name) if last_cut.get(name, -1) <= place)

    def _hold(self, batch: int, place: int) -> None:
        """Look at a batch as it is before an operation."""
        if batch in self._held:
            values, values_cut = self._held[batch]
            self._dense.look_at(values)
            self._cut.look_at(values_cut)
            return
        leaves = self._batches[batch]
        self._held[batch] = self._dense.begin(leaves), self._cut.begin(leaves)
        for step in self._steps[:place]:
            self._advance(batch, *step)

    def _keep(self, batch: int) -> None:
        """Keep what was looked at, where there is room for it."""
        self._held_bytes[batch] = _bytes(self._held[batch])
        if sum(self._held_bytes.values()) > self._most_bytes:
            del self._held[batch], self._held_bytes[batch]

    def _pass(self, place: int) -> None:
        """Run an operation for all batches that are held, and for all where it does not depend on them."""
        one, two, *_ = self._steps[place]
        for side, node in ((self._dense, one), (self._cut, two)):
            if node is not None and not side.reads_batches(node):
                side.look_at({})
                side.run(node)
        for batch in list(self._held):
            self._hold(batch, place)
            self._advance(batch, *self._steps[place])
            self._keep(batch)

    def _advance(
        self, batch: int, one: Node, two: Node | None, gone: tuple[str, ...], gone_cut: tuple[str, ...]
    ) -> None:
        values, values_cut = self._held[batch]
        for side, node, own, names in ((self._dense, one, values, gone), (self._cut, two, values_cut, gone_cut)):
            if node is None:
                continue
            if any(read.name in own for read in node.all_input_nodes):
                side.run(node)
            for name in names:
                own.pop(name, None)


def _read(node: Node) -> list[str]:
    return [one.name for one in node.all_input_nodes]


def _bytes(values: tuple[Values, Values]) -> int:
    """Of all values of a batch; views of one tensor count once."""
    sizes = {}
    for value in (value for side in values for value in side.values()):
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
