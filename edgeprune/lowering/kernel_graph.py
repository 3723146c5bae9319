"""`lower`: the kernels of any candidate of a model, without compiling the candidate.

The dense model is exported once and lowered once by the real runtime. Every tensor of the runtime's graph is joined to the
node of the traced program that it is the value of; so its shape is known at any widths, from the channel graph's labels. The
backend's layout rule then says which kernels run at those shapes.
"""

from __future__ import annotations

import copy
import platform
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends import registry
from edgeprune.backends._base import Backend, Operator, OperatorGraph
from edgeprune.boards.host import host_isa
from edgeprune.errors import ModelError, PlanError, UnsupportedKernelError
from edgeprune.graph.branches import ResidualBranch, idle, removed_branches
from edgeprune.graph.capture import module_path, source_of
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.forms import SizeForm
from edgeprune.graph.norm_groups import grouped_name
from edgeprune.lowering.fitted_forms import FittedForms
from edgeprune.lowering.places import sliding, with_places
from edgeprune.lowering.removal import without_branches
from edgeprune.lowering.same_pieces import pieces_of, slices_of
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.parts import core_of
from edgeprune.spec import Fingerprint, Kernel, Precision

if TYPE_CHECKING:
    import torch

    from edgeprune.boards.board import Board
    from edgeprune.surgery.plan import PruningPlan

Shape = tuple[int, ...]


class KernelGraph:
    """A model as a runtime will execute it, with widths left open.

    Attributes:
        graph: The channel graph whose groups name the widths.
        backend: Whose kernels these are.
        operators: The runtime's graph before layouts are chosen.
        dense_engine: The engine file of the dense model, with its weights, or what it is built from (`Backend.export_source`).
        architecture: Of the board, as in `Fingerprint.architecture`.
        isa: Instruction set flags of the board.
    """

    def __init__(
        self, graph: ChannelGraph, backend: Backend, dense_engine: Path, *, architecture: str, isa: Sequence[str]
    ) -> None:
        self.graph, self.backend, self.dense_engine = graph, backend, dense_engine
        self.architecture, self.isa = architecture, tuple(isa)
        self.operators: OperatorGraph = backend.operators(dense_engine)
        self._nodes, self._inferring = _join(self.operators, graph, backend)
        self._sliding = sliding(self.operators)
        self._idle = {branch.name: idle(graph.program, branch) for branch in graph.branches}
        self._lowered: KernelGraph | None = None  # keeps the dense engine's folder, which goes with it

    def at(self, widths: Mapping[str, int]) -> list[Kernel]:
        """The kernels that run when groups have the given widths, in order.

        Args:
            widths: Group name to units kept, names as in `ChannelGraph.named`; groups left out stay whole. Where all groups of a
                residual branch have width 0, the branch is not there.

        Raises:
            UnsupportedKernelError: The size of a tensor does not follow at these widths, or the runtime has fused the sum of a
                branch that is not there; names the operator.
            PlanError: A group is unknown, a width is out of range, or a group without units lies in no branch that goes.
        """
        operators, shapes = self._candidate(widths)
        return self.backend.layout_rule(operators, shapes, self.architecture, self.isa)

    def of_plan(self, plan: PruningPlan) -> list[Kernel]:
        """The kernels that run when a plan is applied, those of layers with tiles among them.

        Args:
            plan: Made for the traced model.

        Raises:
            UnsupportedKernelError: As for `at`, or a layer with tiles is one whose kernels are not known.
            PlanError: The plan belongs to another model.
        """
        operators, shapes = self._planned(plan)
        return self.backend.layout_rule(operators, shapes, self.architecture, self.isa)

    def network_engine(self, widths: Mapping[str, int]) -> bytes:
        """An engine file at the given widths with meaningless weights, for timing only."""
        return self.backend.network_engine(*self._candidate(widths))

    def layer_kernels(
        self, widths: Mapping[str, int], engine: bytes, layers: Sequence[tuple[str, float]]
    ) -> list[tuple[Kernel, float]]:
        """What kernels took in a timed run of `network_engine` at these widths, layer by layer; see `Backend.layer_kernels`."""
        return self.backend.layer_kernels(engine, *self._candidate(widths), layers)

    def __repr__(self) -> str:
        made_for = f"{self.backend.name} {self.backend.precision}, {self.architecture}"
        return f"KernelGraph({len(self.operators.operators)} operators, {len(self.graph.groups)} channel groups, {made_for})"

    def on(self, board: Board) -> KernelGraph:
        """The same with engines that are built on an open board, where they can only be built there."""
        backend = self.backend.built_on(board)
        if backend is self.backend:
            return self
        made = copy.copy(self)
        made.backend, made._lowered = backend, self
        return made

    def plan_engine(self, plan: PruningPlan) -> bytes:
        """An engine file of the model that a plan leaves, layers with tiles among its own, for timing only.

        Its weights are meaningless.

        Raises:
            UnsupportedKernelError: As for `of_plan`.
            PlanError: As for `of_plan`.
        """
        return self.backend.network_engine(*self._planned(plan))

    @cached_property
    def removable(self) -> tuple[ResidualBranch, ...]:
        """The residual branches whose removal can be priced."""
        return tuple(branch for branch in self.graph.branches if self._can_remove(branch))

    def forms(self, node: str) -> tuple[SizeForm, ...]:
        """The sizes that change with widths in the shapes of the operators that compute a node, as far as they are known.

        Args:
            node: A node of the traced program, as in `Kernel.origin`.
        """
        found: dict[SizeForm, None] = {}
        for operator in self.operators.operators:
            if node in (self.operators.sources.get(name, name) for name in operator.outputs[:1]):
                for tensor in (*operator.inputs, *operator.outputs):
                    axes = self.tensor_forms.get(tensor, ())
                    found |= {form: None for form in axes if form is not None and form.terms}
        return tuple(found)

    @cached_property
    def tensor_forms(self) -> dict[str, tuple[SizeForm | None, ...]]:
        """Forms of the axes of the tensors in `operators`, None where one is not known.

        A tensor that is not joined to a node has those that its sizes at some widths tell.
        """
        axes = self.graph.size_forms()
        found: dict[str, tuple[SizeForm | None, ...]] = {tensor: axes[node] for tensor, node in self._nodes.items()}
        if self._inferring:
            fitted = FittedForms(self.graph.widths(), self._shapes)
            found |= {tensor: fitted.of(tensor) for tensor in fitted.dense if tensor not in found}
        return found

    def _can_remove(self, branch: ResidualBranch) -> bool:
        try:
            self._operators(dict.fromkeys(branch.groups, 0))
        except UnsupportedKernelError:
            return False
        return True

    def _operators(self, widths: Mapping[str, int]) -> OperatorGraph:
        removed = removed_branches(self.graph.branches, widths)
        if not removed:
            return self.operators
        if self.backend.precision != "fp32":
            raise UnsupportedKernelError(
                f"a removed branch must be in fp32 to be told beforehand, found {removed[0].name!r} in {self.backend.precision}."
            )
        return without_branches(
            self.operators, removed, frozenset().union(*(self._idle[branch.name] for branch in removed))
        )

    def _candidate(self, widths: Mapping[str, int]) -> tuple[OperatorGraph, dict[str, Shape]]:
        """The graph at some widths before layouts are chosen, and the shapes of its tensors."""
        widths = self.graph.named(widths)
        operators, shapes = self._operators(widths), self._shapes(widths)
        cut = [one for one in self._sliding if shapes[one.inputs[0]][-1] < self.operators.shapes[one.inputs[0]][-1]]
        there = {operator.name for operator in operators.operators}
        cut = [one for one in cut if one.name in there]
        if cut and self.backend.precision != "fp32":
            raise UnsupportedKernelError(
                f"a convolution over channels that are cut must be in fp32 to be told beforehand, found {cut[0].name!r} in "
                f"{self.backend.precision}."
            )
        return with_places(operators, shapes, cut) if cut else (operators, shapes)

    def _planned(self, plan: PruningPlan) -> tuple[OperatorGraph, dict[str, Shape]]:
        """The graph of what a plan leaves before layouts are chosen, and the shapes of its tensors."""
        from edgeprune.lowering.tiled_layers import tiled_nodes

        if plan.signature != self.graph.signature:
            raise PlanError("a plan must belong to the lowered model, found one with another signature.")
        widths, layouts = tiled_nodes(self.graph, plan)
        operators, shapes = self._candidate(widths)
        return self.backend.tiled(operators, shapes, layouts) if layouts else (operators, shapes)

    def _shapes(self, widths: Mapping[str, int]) -> dict[str, Shape]:
        # What is not there has no shape that anyone asks for.
        present = {name: width for name, width in widths.items() if width != 0}
        shapes = self.graph.shapes({**self.graph.widths(), **present})
        known = {tensor: shapes[node] for tensor, node in self._nodes.items()}
        for operator in self._inferring:
            found = self.backend.infer_shapes(operator, self.operators, known)
            if found is None:
                raise _unsized(operator, operator.outputs[0], self.operators, self.graph)
            known |= found
        return known


def lower(
    graph: ChannelGraph,
    backend: str | Backend = "onnxruntime",
    *,
    model: torch.nn.Module | None = None,
    device: Fingerprint | Mapping[str, Any] | None = None,
    precision: Precision = "fp32",
    workdir: Path | None = None,
) -> KernelGraph:
    """Lower a traced model for a backend, as it is when it is trained (`edgeprune.lowering.trained_form`).

    Args:
        graph: From `edgeprune.trace`.
        backend: Name or object.
        model: The traced model, where it is not the one that the graph remembers.
        device: What will run it: a probed board, or the ``identity`` in the header of its latency table; None means this
            machine.
        precision: Of the arithmetic. The dense engine of another than fp32 is for timing only: in int8 every layer is
            quantized, with the ranges of the example inputs, since latency does not depend on them.
        workdir: Folder for the dense engine; None means a temporary one, which goes with the kernel graph.

    Raises:
        ModelError: It is not a traced model.
        BackendUnavailableError: The backend is not installed on this host.
        ConfigError: It has no such precision.
        CompileError: In int8: no layer has weights.
        ExportError: The model cannot be exported.
        UnsupportedKernelError: An operator's shape cannot be told from the widths.
    """
    if not isinstance(graph, ChannelGraph):
        raise ModelError(
            f"a model must be traced before it is lowered, found {type(graph).__name__}.",
            hint="edgeprune.lower(edgeprune.trace(model, example_inputs))",
        )
    if workdir is None:
        folder = Path(tempfile.mkdtemp(prefix="edgeprune-lower-"))
        try:
            made = lower(graph, backend, model=model, device=device, precision=precision, workdir=folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
        return made
    chosen = registry.get(backend).for_board(device)
    if precision != "fp32":
        chosen = chosen.for_precision(precision).for_timing()
    workdir.mkdir(parents=True, exist_ok=True)
    engine = workdir / f"dense{chosen.suffix}"
    whole = in_trained_form(graph.model if model is None else model)
    chosen.export_source(core_of(whole, graph.parts), graph.example_inputs, engine)
    if device is None:
        return KernelGraph(graph, chosen, engine, architecture=platform.machine(), isa=host_isa())
    identity = device.identity(chosen.name) if isinstance(device, Fingerprint) else device
    return KernelGraph(graph, chosen, engine, architecture=identity["architecture"], isa=identity["isa"])


def _join(
    operators: OperatorGraph, graph: ChannelGraph, backend: Backend
) -> tuple[dict[str, str], tuple[Operator, ...]]:
    """Tensor of the runtime's graph to the node or parameter whose shape it has at all widths, and the rest.

    The rest are operators whose other tensors (an exporter's intermediate value, a folded constant) follow from those,
    in an order in which they do. Where a shape does not follow the operator cannot be priced, and guessing is no option.

    Raises:
        UnsupportedKernelError: Names the operator.
    """
    dense = graph.shapes(graph.widths())
    several = {node.name for node in graph.program.graph.nodes} - dense.keys()
    nodes: dict[str, str] = {}
    for name, shape in operators.shapes.items():
        source = operators.sources.get(name)
        # Which result it is of an operation that has several is not told by what the exporter calls it.
        for candidate in (source,) if source in several else (source, name):
            if candidate is not None and dense.get(candidate) == shape:
                nodes[name] = candidate
                break
    slices = slices_of(graph.program.graph, dense)
    for operator in operators.operators:
        for name, (whole, axis, begin, end) in pieces_of(operator, operators.shapes):
            node = slices.get((nodes.get(whole, ""), axis, begin, end))
            if node is not None and operators.sources.get(name) not in dense and dense[node] == operators.shapes[name]:
                nodes[name] = node
    for operator in operators.operators:
        for name in operator.outputs:
            if name not in nodes and len(shape := operators.shapes.get(name, ())) == 3 and operator.inputs:
                grouped = grouped_name(nodes.get(operator.inputs[0], ""), shape[1])
                if dense.get(grouped) == shape:
                    nodes[name] = grouped
    known = {name: operators.shapes[name] for name in nodes}
    inferring: list[Operator] = []
    for operator in operators.operators:
        for name in (*operator.inputs, *operator.outputs[:1]):
            if name not in operators.shapes:
                raise _unsized(operator, name, operators, graph)
    narrow = _narrow(nodes, graph)
    waiting = [operator for operator in operators.operators if _unknown(operator, operators, known)]
    while waiting:
        for operator in waiting:
            found = backend.infer_shapes(operator, operators, known)
            # What follows from sizes that happen to be equal in the dense model is found out at other widths.
            elsewhere = backend.infer_shapes(operator, operators, narrow)
            if found and elsewhere and all(operators.shapes.get(name) == shape for name, shape in found.items()):
                known |= found
                narrow |= elsewhere
                inferring.append(operator)
        left = [operator for operator in waiting if _unknown(operator, operators, known)]
        if len(left) == len(waiting):
            raise _unsized(left[0], _unknown(left[0], operators, known)[0], operators, graph)
        waiting = left
    return nodes, tuple(inferring)


def _narrow(nodes: Mapping[str, str], graph: ChannelGraph) -> dict[str, Shape]:
    """Shapes of the joined tensors when every group is about half as wide."""
    shapes = graph.shapes({name: (size + 1) // 2 for name, size in graph.widths().items()})
    return {name: shapes[node] for name, node in nodes.items()}


def _unsized(operator: Operator, name: str, operators: OperatorGraph, graph: ChannelGraph) -> UnsupportedKernelError:
    where = _user_place(operator, operators, graph)
    return UnsupportedKernelError(
        f"the size of every tensor must follow from the widths, that of {name!r} at {operator.op} {operator.name!r}{where} "
        f"(dense {operators.shapes.get(name, 'unknown')}) is not known to.",
        hint="edgeprune.uniform_plan prunes without a latency",
    )


def _user_place(operator: Operator, operators: OperatorGraph, graph: ChannelGraph) -> str:
    """The user's layer and line that an operator works for: those of the next value of the program that it leads to."""
    nodes = {node.name: node for node in graph.program.graph.nodes}
    reached = set(operator.outputs)
    for following in operators.operators[operators.operators.index(operator) :]:
        if reached.isdisjoint((*following.inputs, *following.outputs)):
            continue
        for name in following.outputs:
            node = nodes.get(operators.sources.get(name, ""))
            if node is not None:
                return f" in {module_path(node) or 'the model'} ({source_of(node) or node.name})"
        reached.update(following.outputs)
    return ""


def _unknown(operator: Operator, operators: OperatorGraph, known: Mapping[str, Shape]) -> list[str]:
    names = (*operator.inputs, *operator.outputs)
    return [name for name in names if name in operators.shapes and name not in known]
