"""The dense and the cut program run side by side, operation by operation, over all calibration batches at once.

So whatever is changed in the cut model at one operation is what all later ones see, in a single pass over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from edgeprune.errors import ReconstructionError
from edgeprune.graph.rules._base import named_arguments

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_COPY = "aten.clone.default"


class Side:
    """One program with its weights and all values that are still needed.

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
        self._of_batches: dict[str, list[Any]] = {}
        for spec in program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                self._inputs.append(spec.arg.name)
                continue
            name = str(spec.target)
            self.targets[spec.arg.name] = name
            self._fixed[spec.arg.name] = tensors[name] if name in tensors else program.constants[name]

    def begin(self, batches: Sequence[Sequence[Any]]) -> None:
        """Take in the batches: flat inputs of the program each; copies, for a program may write to its inputs."""
        for place, name in enumerate(self._inputs):
            values = [leaves[place] for leaves in batches]
            self._of_batches[name] = [value.clone() if isinstance(value, torch.Tensor) else value for value in values]

    def fixed(self, node: Node) -> torch.Tensor:
        """A parameter, a buffer, or what is computed of those alone."""
        found: torch.Tensor = self._fixed[node.name]
        return found

    def replace(self, node: Node, value: torch.Tensor) -> None:
        """Change a parameter or buffer for all operations that are still to run."""
        self._fixed[node.name] = value

    def has(self, node: Node) -> bool:
        """Whether a value of the batches has been computed, and not been thrown away yet."""
        return node.name in self._of_batches

    def of_batches(self, node: Node) -> list[Any]:
        """A node's value for each batch."""
        return self._of_batches[node.name]

    def arguments(self, node: Node, batch: int) -> dict[str, Any]:
        """Arguments of an operation by name, for one batch."""
        named: dict[str, Any] = map_arg(named_arguments(node), partial(self._value, batch=batch))
        return named

    def run(self, node: Node, batches: int) -> None:
        """Compute an operation for all batches, and throw away what nobody reads after it."""
        if any(one.name in self._of_batches for one in node.all_input_nodes):
            results = []
            for batch in range(batches):
                args, kwargs = map_arg((node.args, node.kwargs), partial(self._value, batch=batch))
                results.append(node.target(*args, **kwargs))  # type: ignore[operator]
            self._of_batches[node.name] = results
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda one: self._fixed[one.name])
            self._fixed[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]

    def forget(self, names: Sequence[str]) -> None:
        """Throw values away."""
        for name in names:
            self._of_batches.pop(name, None)

    def _value(self, node: Node, batch: int) -> Any:
        return self._of_batches[node.name][batch] if node.name in self._of_batches else self._fixed[node.name]


def side_by_side(
    dense: Side,
    cut: Side,
    batches: Sequence[Sequence[Any]],
    visit: Callable[[Node, Node], None],
    progress: Callable[[int, int], None] | None = None,
    removed: Collection[str] = (),
) -> None:
    """Run both; before each operation `visit` is called with its node in either program, and may change the cut side.

    Where something was removed, a sum or what followed it may be a copy in the cut program; those are not visited.

    Args:
        dense: The dense model.
        cut: The cut one.
        batches: Flat inputs per batch; both get the same.
        visit: Called with (dense node, cut node).
        progress: Called with (operations done, in all).
        removed: Operations of the dense program that the cut one does not have.

    Raises:
        ReconstructionError: The two programs are not made of the same operations.
    """
    calls = [node for node in dense.nodes if node.op == "call_function"]
    there = [node for node in calls if node.name not in removed]
    calls_cut = [node for node in cut.nodes if node.op == "call_function"]
    partner = dict(zip(there, calls_cut, strict=False))
    copies = {one for one, two in partner.items() if removed and str(two.target) == _COPY}
    if len(there) != len(calls_cut) or any(
        str(one.target) != str(two.target) and one not in copies for one, two in partner.items()
    ):
        raise ReconstructionError(
            "the cut model must run the operations of the dense one to be reconstructed, found others.",
            hint="fine-tuning, without reconstruction",
        )
    dense.begin(batches)
    cut.begin(batches)
    last_use = {name: place for place, node in enumerate(calls) for name in _read(node)}
    last_use_cut = {name: place for place, node in enumerate(calls) if node in partner for name in _read(partner[node])}
    with torch.no_grad():
        for place, one in enumerate(calls):
            two = partner.get(one)
            if two is not None and one not in copies:
                visit(one, two)
            dense.run(one, len(batches))
            dense.forget([name for name in (*_read(one), one.name) if last_use.get(name, -1) <= place])
            if two is not None:
                cut.run(two, len(batches))
                cut.forget([name for name in (*_read(two), two.name) if last_use_cut.get(name, -1) <= place])
            if progress is not None:
                progress(place + 1, len(calls))


def _read(node: Node) -> list[str]:
    return [one.name for one in node.all_input_nodes]
