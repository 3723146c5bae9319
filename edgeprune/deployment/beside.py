"""An engine beside ONNX Runtime's of the same module: which of the two is the faster on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends import registry
from edgeprune.boards.board import Board
from edgeprune.deployment.golden import positional
from edgeprune.profiling.comparing import compare

if TYPE_CHECKING:
    import torch

    from edgeprune.deployment.artifact import Artifact

_ROUNDS, _PROCESSES = 12, 3
_REFERENCE = "onnxruntime"


@dataclass(frozen=True)
class Beside:
    """Two engines of one module, timed interleaved on this machine.

    Attributes:
        backend: Of the engine.
        engine_ms: What it takes, milliseconds.
        onnxruntime_ms: What ONNX Runtime takes, milliseconds.
        ratio: Of the first to the second in the same rounds.
        low: Lower end of the interval of that ratio, 95 %.
        high: Upper end.
    """

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
        return f"on this machine {times}: {told} of its time"


def beside_onnxruntime(
    artifact: Artifact,
    module: torch.nn.Module,
    example_inputs: Any,
    *,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int, int, float, str], None] | None = None,
) -> Beside:
    """Time an artifact's engine beside ONNX Runtime's of the same module, on this machine.

    Args:
        artifact: What was compiled; this machine must be able to run its engine.
        module: What it was compiled from.
        example_inputs: Of the module.
        threads: Threads inside one operation.
        seed: Of the interval.
        progress: Told (items done, items in all, seconds left, what happens).

    Raises:
        ExportError: The module cannot be exported to ONNX.
        BackendError: One of the engines does not run here.
    """
    backend = artifact.manifest.backend
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder, Board.open("local") as board:
        other = Path(folder) / "other.onnx"
        registry.get(_REFERENCE).for_board(board.probe()).export(module, positional(module, example_inputs), other)
        with board.hold(f"time {backend} beside {_REFERENCE}"):
            found = compare(
                board,
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
        backend=backend,
        engine_ms=found.measurements[backend].median_ms,
        onnxruntime_ms=found.measurements[_REFERENCE].median_ms,
        ratio=ratio.ratio,
        low=ratio.low,
        high=ratio.high,
    )
