"""The ONNX Runtime backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgeprune.backends._base import Backend, Operator, OperatorGraph
from edgeprune.boards.installing import install_command
from edgeprune.spec import Fingerprint, Kernel, Requirement, TensorSpec

if TYPE_CHECKING:
    import torch

# The release that brought ONNX 1.14, and with it IR version 9; older ones have not been tried, nor has this one.
_OLDEST = (1, 15)


class OnnxRuntime(Backend):
    """Portable ONNX engines run by ONNX Runtime's CPU provider."""

    name: ClassVar[str] = "onnxruntime"
    install: ClassVar[str] = "pip install 'edgeprune[onnxruntime]'"
    suffix: ClassVar[str] = ".onnx"

    def availability(self) -> str | None:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        return f"missing: {', '.join(missing)}" if missing else None

    def requirements(self, fingerprint: Fingerprint, needs: Mapping[str, Any] | None = None) -> list[Requirement]:
        found = fingerprint.runtimes.get(self.name, {}).get("version")
        oldest = str((needs or {}).get("min_version") or ".".join(map(str, _OLDEST)))
        met = found is not None and _version(found) >= _version(oldest)
        hint = install_command(f"onnxruntime>={oldest}", fingerprint)
        return [Requirement("onnxruntime", f">= {oldest}", found or "none", met, hint)]

    def needs(self, engine: Path) -> dict[str, Any]:
        """A portable ``.onnx`` file needs a runtime that reads its opset and IR version, and nothing else."""
        import onnx

        model = onnx.load(str(engine), load_external_data=False)
        opset = max(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        return {"ir_version": int(model.ir_version), "opset": opset}

    def export(
        self, module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], path: Path
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        from edgeprune.backends.onnxruntime import exporting

        return exporting.export(module, example_inputs, path)

    def operators(self, engine: Path) -> OperatorGraph:
        from edgeprune.backends.onnxruntime import engines

        return engines.operators(engine)

    def infer_shapes(
        self, operator: Operator, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]] | None:
        """See `Backend.infer_shapes`."""
        from edgeprune.backends.onnxruntime.shapes import inferred

        return inferred(operator, graph.shapes, shapes)

    def views(self) -> frozenset[str]:
        from edgeprune.backends.onnxruntime.operators import VIEWS

        return VIEWS

    def in_place(self) -> frozenset[str]:
        from edgeprune.backends.onnxruntime.operators import IN_PLACE

        return IN_PLACE

    def layout_rule(
        self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]], architecture: str, isa: Sequence[str]
    ) -> list[Kernel]:
        from edgeprune.backends.onnxruntime import layout

        return layout.kernels(graph, shapes, layout.block_size(architecture, isa))

    def parse_engine(self, engine: Path) -> list[Kernel]:
        from edgeprune.backends.onnxruntime import engines

        return engines.parse(engine)

    def kernel_engine(self, kernel: Kernel) -> bytes:
        from edgeprune.backends.onnxruntime import engines

        return engines.kernel_engine(kernel)

    def network_engine(self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
        from edgeprune.backends.onnxruntime import engines

        return engines.network_engine(graph, shapes)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
