"""The models of one profiling run, lowered for its board, and the names that their networks get in the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError
from edgeprune.profiling import space, tiled_draws
from edgeprune.profiling.tiled_draws import Tile, TiledDraw, TiledPlans
from edgeprune.spec import Fingerprint, Kernel, Precision

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.boards.board import Board
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.table import LatencyTable, Network
    from edgeprune.lowering.kernel_graph import KernelGraph

DENSE = "dense"
"""Name of the dense network of a table's first model."""

Candidate = space.Widths | TiledDraw
"""A network to measure: the model at some widths, or without some tiles."""


@dataclass(frozen=True)
class Subject:
    """One model of a profiling run.

    Attributes:
        name: What a person calls it; unique in the table.
        prefix: What the names of its networks begin with; empty for the first model of a table.
        kernel_graph: The lowered model.
        tiles: Sizes of tiles whose kernels are measured too.
    """

    name: str
    prefix: str
    kernel_graph: KernelGraph
    tiles: tuple[Tile, ...] = ()

    def network(self, number: int) -> str:
        """Name of one of its networks in a table; the dense one is number 0."""
        return self.prefix + (DENSE if number == 0 else f"network-{number:02d}")

    def tiled_network(self, number: int) -> str:
        """Name of one of its networks without some tiles."""
        return f"{self.prefix}tiles-{number:02d}"

    @cached_property
    def plans(self) -> TiledPlans:
        """Plans without some tiles."""
        return TiledPlans(self.kernel_graph)

    def kernels(self, candidate: Candidate) -> list[Kernel]:
        """What a network runs.

        Raises:
            ConfigError: See `TiledPlans.of`.
            UnsupportedKernelError: The kernels of tiles are not known.
        """
        if isinstance(candidate, TiledDraw):
            return self.kernel_graph.of_plan(self.plans.of(candidate))
        return self.kernel_graph.at(candidate)

    def engine(self, candidate: Candidate) -> bytes:
        """An engine file of a network, for timing only; raises what `kernels` does."""
        if isinstance(candidate, TiledDraw):
            return self.kernel_graph.plan_engine(self.plans.of(candidate))
        return self.kernel_graph.network_engine(candidate)

    def widths(self, candidate: Candidate) -> space.Widths:
        """Units of every group of a network."""
        return space.group_sizes(self.kernel_graph) if isinstance(candidate, TiledDraw) else candidate

    def tiled(self, seed: int) -> list[Counter[Kernel]]:
        """Kernels of drawn plans without some tiles, with how often each runs them; raises what `kernels` does."""
        return [Counter(self.kernels(draw)) for draw in tiled_draws.draws(self.tiles, seed=seed)]

    def dense(self) -> Counter[Kernel]:
        """Kernels of the dense model, with how often it runs them."""
        return Counter(self.kernel_graph.at(space.group_sizes(self.kernel_graph)))

    def shapes(self) -> list[list[int]]:
        """Shapes of its example inputs, which fix the deployment batch."""
        return [list(tensor.shape) for tensor in self.kernel_graph.graph.example_inputs]

    def dense_in(self, table: LatencyTable | None) -> Network | None:
        """The table's measurement of this very model, dense; None where it has none."""
        wanted = Counter({kernel.key: count for kernel, count in self.dense().items()})
        networks = [] if table is None else table.networks
        return next((network for network in networks if network.kernels == wanted), None)


def lowered_subjects(
    model: nn.Module | Mapping[str, nn.Module],
    example_inputs: Any,
    backend: str,
    board: Board,
    fingerprint: Fingerprint,
    folder: Path,
    *,
    precision: Precision = "fp32",
    graph: ChannelGraph | Mapping[str, ChannelGraph] | None = None,
    kernel_graph: KernelGraph | Mapping[str, KernelGraph] | None = None,
    table: LatencyTable | None = None,
    tiles: Sequence[Tile] = (),
) -> list[Subject]:
    """Trace and lower what the caller has not.

    Args:
        model: One model, or several by name.
        example_inputs: Of the model; with several, by the same names.
        backend: Which runtime executes the kernels.
        board: For which, and on which engines are built that can only be built there.
        fingerprint: Of the board.
        folder: For the dense engines.
        precision: Of the engines.
        graph: The traced model or models, where the caller has them.
        kernel_graph: The lowered model or models, where the caller has them.
        table: The table that is extended.
        tiles: Sizes of tiles whose kernels are measured too.

    Raises:
        ConfigError: There is no model, models and inputs have different names, the backend has no such precision, a kernel
            graph has another, or a model has no linear layer that is larger than one of the tiles.
        UnsupportedKernelError: The backend's kernels of tiles are not known.
    """
    models = _by_name(model, example_inputs)
    taken = set() if table is None else {network.name for network in table.networks}
    # Of a table's first model the networks' names do not tell the model's.
    taken |= set() if table is None else {f"{entry.get('name', '')}/" for entry in table.header.get("models", ())}
    subjects: list[Subject] = []
    for number, (name, (module, inputs)) in enumerate(models.items()):
        given = kernel_graph.get(name) if isinstance(kernel_graph, Mapping) else kernel_graph
        if given is None:
            traced = graph.get(name) if isinstance(graph, Mapping) else graph
            given = _lower(module, inputs, backend, fingerprint, precision, traced, folder / str(number))
        if given.backend.precision != precision:
            raise ConfigError(f"the model must be lowered for {precision}, found {given.backend.precision}.")
        prefix = "" if not taken and not subjects else _free_prefix(name, taken, subjects)
        subjects.append(Subject(prefix.rstrip("/") or name, prefix, given.on(board), tuple(dict.fromkeys(tiles))))
        for draw in tiled_draws.networks(tiles, seed=0)[: len(tiles)]:
            subjects[-1].kernels(draw)  # tells now, not after minutes, that there are none
    return subjects


def _by_name(model: nn.Module | Mapping[str, nn.Module], inputs: Any) -> dict[str, tuple[nn.Module, Any]]:
    if not isinstance(model, Mapping):
        return {type(model).__name__: (model, inputs)}
    if not model or not isinstance(inputs, Mapping) or set(inputs) != set(model):
        found = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ConfigError(f"several models need example inputs by the same names {sorted(model)}, found {found}.")
    return {name: (module, inputs[name]) for name, module in model.items()}


def _free_prefix(name: str, taken: Collection[str], subjects: Collection[Subject]) -> str:
    number = 1
    while True:
        prefix = f"{name}/" if number == 1 else f"{name}-{number}/"
        used = any(other.startswith(prefix) for other in taken) or any(subject.prefix == prefix for subject in subjects)
        if not used:
            return prefix
        number += 1


def _lower(
    model: nn.Module,
    example_inputs: Any,
    backend: str,
    fingerprint: Fingerprint,
    precision: Precision,
    graph: ChannelGraph | None,
    folder: Path,
) -> KernelGraph:
    from edgeprune.graph.tracing import trace
    from edgeprune.lowering.kernel_graph import lower

    traced = trace(model, example_inputs) if graph is None else graph
    return lower(traced, backend, model=model, device=fingerprint, precision=precision, workdir=folder)
