"""`lower`: the kernels of any candidate of a model, without compiling the candidate.

The dense model is exported once and lowered once by the real runtime. Every tensor of the runtime's graph is joined to the
node of the traced program that it is the value of; so its shape is known at any widths, from the channel graph's labels. The
backend's layout rule then says which kernels run at those shapes.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.backends import registry
from edgeprune.backends._base import Backend, OperatorGraph
from edgeprune.errors import UnsupportedKernelError
from edgeprune.spec import Kernel

if TYPE_CHECKING:
    import torch

    from edgeprune.graph.channel_graph import ChannelGraph

Shape = tuple[int, ...]


class KernelGraph:
    """A model as a runtime will execute it, with widths left open.

    Attributes:
        graph: The channel graph whose groups name the widths.
        backend: Whose kernels these are.
        operators: The runtime's graph before layouts are chosen.
        dense_engine: The engine file of the dense model, with its weights.
        architecture: Of the board, as in `Fingerprint.architecture`.
        isa: Instruction set flags of the board.
    """

    def __init__(
        self, graph: ChannelGraph, backend: Backend, dense_engine: Path, *, architecture: str, isa: Sequence[str]
    ) -> None:
        self.graph, self.backend, self.dense_engine = graph, backend, dense_engine
        self.architecture, self.isa = architecture, tuple(isa)
        self.operators: OperatorGraph = backend.operators(dense_engine)
        self._nodes = _join(self.operators, graph)

    def at(self, widths: Mapping[str, int]) -> list[Kernel]:
        """The kernels that run when groups have the given widths, in order.

        Args:
            widths: Group name to units kept; groups left out stay whole.
        """
        return self.backend.layout_rule(self.operators, self._shapes(widths), self.architecture, self.isa)

    def network_engine(self, widths: Mapping[str, int]) -> bytes:
        """An engine file at the given widths with meaningless weights, for timing only."""
        return self.backend.network_engine(self.operators, self._shapes(widths))

    def _shapes(self, widths: Mapping[str, int]) -> dict[str, Shape]:
        shapes = self.graph.shapes({**self.graph.widths(), **widths})
        return {tensor: shapes[node] for tensor, node in self._nodes.items()}


def lower(
    graph: ChannelGraph,
    backend: str | Backend = "onnxruntime",
    *,
    model: torch.nn.Module | None = None,
    architecture: str | None = None,
    isa: Sequence[str] | None = None,
    workdir: Path | None = None,
) -> KernelGraph:
    """Lower a traced model for a backend.

    Args:
        graph: From `edgeprune.trace`.
        backend: Name or object.
        model: The traced model, where it is not the one that the graph remembers.
        architecture: Of the board; None means this machine.
        isa: Instruction set flags of the board, as probed; None means this machine's.
        workdir: Folder for the dense engine; None means a temporary one.

    Raises:
        BackendUnavailableError: The backend is not installed on this host.
        ExportError: The model cannot be exported.
        UnsupportedKernelError: An operator's shape cannot be told from the widths.
    """
    chosen = registry.get(backend)
    folder = Path(tempfile.mkdtemp(prefix="edgeprune-lower-")) if workdir is None else workdir
    folder.mkdir(parents=True, exist_ok=True)
    engine = folder / f"dense{chosen.suffix}"
    chosen.export(model if model is not None else graph.model, graph.example_inputs, engine)
    return KernelGraph(
        graph,
        chosen,
        engine,
        architecture=architecture or platform.machine(),
        isa=host_isa() if isa is None else isa,
    )


def host_isa() -> tuple[str, ...]:
    """Instruction set flags of this machine, as Linux names them; empty where they cannot be read."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else ():
        if line.startswith(("flags", "Features")):
            return tuple(line.partition(":")[2].split())
    return ()


def _join(operators: OperatorGraph, graph: ChannelGraph) -> dict[str, str]:
    """Tensor of the runtime's graph to the node or parameter whose shape it has at all widths.

    A tensor without a node of its own (an exporter's intermediate value) takes the shape of an operand of the same dense
    shape; where there is none the operator cannot be priced, and guessing is not an option.
    """
    dense = graph.shapes(graph.widths())
    nodes: dict[str, str] = {}

    def joined(name: str) -> bool:
        for candidate in (operators.sources.get(name), name):
            if candidate is not None and candidate in dense and dense[candidate] == operators.shapes[name]:
                nodes[name] = candidate
                return True
        return name in nodes

    for spec in operators.inputs:
        joined(spec.name)
    for operator in operators.operators:
        known = [name for name in operator.inputs if joined(name)]
        for name in operator.outputs:
            if joined(name) or name not in operators.shapes:
                continue
            alike = [operand for operand in known if operators.shapes[operand] == operators.shapes[name]]
            if not alike:
                raise UnsupportedKernelError(
                    "the latency of every operator must be known at all widths, that of attention and of normalization "
                    f"layers is not yet, found {operator.op} {operator.name!r} of shape {operators.shapes[name]}.",
                    hint="profile a convolutional network, or prune without a latency: edgeprune.uniform_plan",
                )
            nodes[name] = nodes[alike[0]]
    return nodes
