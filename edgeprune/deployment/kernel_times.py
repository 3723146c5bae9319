"""What each kernel of an artifact's engine takes on a board, by the trace of its runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.backends import registry
from edgeprune.boards.board import Board
from edgeprune.deployment import preflight
from edgeprune.deployment.artifact import Artifact

_RUNS = 100
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class KernelTime:
    """One kernel of an engine, as its runtime executes it.

    Attributes:
        name: The runtime's name of it.
        op: What it computes, where that is known.
        module: Path of the module whose call it computes, where that is known.
        us: What it takes, microseconds, in a run that is traced.
        share: Of the sum over all kernels.
    """

    name: str
    op: str | None
    module: str | None
    us: float
    share: float


@dataclass(frozen=True)
class KernelTimes:
    """Kernels of an engine in the order in which they run.

    Attributes:
        kernels: One per kernel.
        whole_ms: What an inference takes without the trace, milliseconds.
    """

    kernels: tuple[KernelTime, ...]
    whole_ms: float

    @property
    def sum_ms(self) -> float:
        """All kernels added up, milliseconds: without what is between them, and with what the trace costs."""
        return sum(kernel.us for kernel in self.kernels) / 1e3


def kernel_times(artifact: Artifact, board: str | Board = "local", *, threads: int = 1) -> KernelTimes:
    """Trace an artifact's engine on a board. Nothing is switched there; the engine stays in the store until it is cleaned.

    Args:
        artifact: What was compiled, for that board.
        board: As in `Board.open`.
        threads: Threads inside one operation.

    Raises:
        IncompatibleTargetError: The board cannot run the engine.
        EmulatedProcessorError: What is timed there means nothing.
        BackendUnavailableError: The runtime does not tell what a kernel takes.
        RemoteError: The board is busy, or was lost.
    """
    manifest = artifact.manifest
    with Board.open(board) as opened:
        preflight.check(manifest, opened.probe(), board=opened.name, threads=threads)
        with opened.hold("layers"):
            entry = {"blob": opened.push(artifact.engine)}
            request = {"engine": entry, "runtime": manifest.backend, "threads": threads, "runs": _RUNS}
            told = opened.call("layers", request, timeout_s=_TIMEOUT_S)
    operations, modules = registry.get(manifest.backend).labels(artifact.engine)
    whole_us = sum(row["us"] for row in told["kernels"]) or 1.0
    return KernelTimes(
        tuple(
            KernelTime(
                name=row["name"],
                op=row["op"] or operations.get(row["name"]),
                module=_module(row["name"], modules),
                us=float(row["us"]),
                share=float(row["us"]) / whole_us,
            )
            for row in told["kernels"]
        ),
        float(told["whole_ms"]),
    )


def _module(name: str, modules: Mapping[str, str]) -> str | None:
    """Of the longest node's name that a kernel's name begins with: the runtime adds to it what it did."""
    begun = [node for node in modules if node and name.startswith(node)]
    return modules[max(begun, key=len)] if begun else None
