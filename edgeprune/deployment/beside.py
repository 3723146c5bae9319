"""An engine beside ONNX Runtime's of the same module: which of the two is the faster on this machine, or on a board."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends import registry
from edgeprune.boards.board import Board
from edgeprune.boards.installing import for_board
from edgeprune.boards.local import LocalTransport
from edgeprune.deployment.golden import positional
from edgeprune.errors import IncompatibleTargetError
from edgeprune.profiling.comparing import compare

if TYPE_CHECKING:
    import torch

    from edgeprune.deployment.artifact import Artifact

_ROUNDS, _PROCESSES = 12, 3
_REFERENCE = "onnxruntime"


@dataclass(frozen=True)
class Beside:
    """Two engines of one module, timed interleaved.

    Attributes:
        where: In words.
        backend: Of the engine.
        engine_ms: What it takes, milliseconds.
        onnxruntime_ms: What ONNX Runtime takes, milliseconds.
        ratio: Of the first to the second in the same rounds.
        low: Lower end of the interval of that ratio, 95 %.
        high: Upper end.
    """

    where: str
    backend: str
    engine_ms: float
    onnxruntime_ms: float
    ratio: float
    low: float
    high: float

    @property
    def slower(self) -> bool:
        """Whether the engine is the slower one beyond doubt."""
        return self.low > 1

    def __str__(self) -> str:
        told = f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"
        times = f"{self.backend} takes {self.engine_ms:.3g} ms, onnxruntime {self.onnxruntime_ms:.3g} ms"
        return f"on {self.where} {times}: {told} of its time"


def beside_onnxruntime(
    artifact: Artifact,
    module: torch.nn.Module,
    example_inputs: Any,
    *,
    board: Board | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int, int, float, str], None] | None = None,
) -> Beside:
    """Time an artifact's engine beside ONNX Runtime's of the same module.

    Args:
        artifact: What was compiled; where it is timed its engine must run.
        module: What it was compiled from.
        example_inputs: Of the module.
        board: Where, open; this machine by default.
        threads: Threads inside one operation.
        seed: Of the interval.
        progress: Told (items done, items in all, seconds left, what happens).

    Raises:
        ExportError: The module cannot be exported to ONNX.
        BackendError: One of the engines does not run there.
        IncompatibleTargetError: The board has no ONNX Runtime.
        RemoteError: The board is busy, or was lost.
    """
    backend = artifact.manifest.backend
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-"))
        where = stack.enter_context(Board.open("local" if board is None else board))
        other, device = Path(folder) / "other.onnx", where.probe()
        for item in registry.get(_REFERENCE).requirements(device):
            if not item.met:
                hint = for_board(item.hint, where.name)
                raise IncompatibleTargetError(item.field, item.needed, item.found, hint=hint)
        registry.get(_REFERENCE).for_board(device).export(module, positional(module, example_inputs), other)
        with where.hold(f"time {backend} beside {_REFERENCE}"):
            found = compare(
                where,
                {_REFERENCE: other, backend: artifact.engine},
                _REFERENCE,
                runtimes={backend: backend},
                threads=threads,
                rounds=_ROUNDS,
                processes=_PROCESSES,
                seed=seed,
                progress=progress,
            )
    ratio = found.ratios[backend]
    return Beside(
        where="this machine" if isinstance(where.transport, LocalTransport) else f"board {where.name}",
        backend=backend,
        engine_ms=found.measurements[backend].median_ms,
        onnxruntime_ms=found.measurements[_REFERENCE].median_ms,
        ratio=ratio.ratio,
        low=ratio.low,
        high=ratio.high,
    )
