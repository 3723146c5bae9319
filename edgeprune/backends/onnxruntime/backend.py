"""The ONNX Runtime backend."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgeprune.backends._base import CALIBRATION, Backend, Case, Operator, OperatorGraph, Session, Told
from edgeprune.backends.onnxruntime.int8_numbers import Int8Numbers
from edgeprune.backends.onnxruntime.versions import OnnxVersions, oldest_reader, written_for
from edgeprune.boards.installing import SETUP
from edgeprune.errors import ConfigError, UnsupportedKernelError
from edgeprune.spec import Fingerprint, Kernel, Precision, Requirement, TensorSpec

if TYPE_CHECKING:
    import torch

    from edgeprune.surgery.tile_layout import TileLayout

_OLDEST = "1.10"
"""What Python 3.6 gets; older ones have not been tried."""
_FIRST_WITH_NUMPY_2 = "1.19"
"""Older ones state no upper bound and fail at import. Source: release notes of ONNX Runtime 1.19."""


class OnnxRuntime(Backend):
    """Portable ONNX engines run by ONNX Runtime's CPU provider.

    Args:
        runtime: Version of the ONNX Runtime that is to read the engines; None means this host's. See `for_board`.
        precision: Of the engines. See `for_precision`.
        numbers: Form of int8 engines' numbers; None means what suits this host. See `for_board`.
    """

    name: ClassVar[str] = "onnxruntime"
    install: ClassVar[str] = "pip install 'edgeprune[onnxruntime]'"
    suffix: ClassVar[str] = ".onnx"
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "int8")

    def __init__(
        self, runtime: str | None = None, precision: Precision = "fp32", numbers: Int8Numbers | None = None
    ) -> None:
        self._runtime, self._precision, self._numbers = runtime, precision, numbers
        self._calibration: tuple[Sequence[Case], float, Told | None] | None = None
        self._for_timing = False

    @property
    def precision(self) -> Precision:
        """See `Backend.precision`."""
        return self._precision

    @property
    def numbers(self) -> Int8Numbers:
        """Form of int8 engines' numbers: the board's, or where none is known this host's."""
        return self._numbers or Int8Numbers.of_host()

    @property
    def versions(self) -> OnnxVersions:
        """Opset and IR version of the engines."""
        if self._runtime is None:
            from edgeprune.backends.onnxruntime.runtime import onnxruntime

            self._runtime = str(onnxruntime.__version__)
        return written_for(self._runtime)

    def for_board(self, device: Fingerprint | Mapping[str, Any] | None) -> OnnxRuntime:
        """The backend whose engines the board's ONNX Runtime reads; this one where that is not known."""
        if isinstance(device, Fingerprint):
            device = device.identity(self.name)
        told = device or {}
        version = str(told.get("runtime_version")) if told.get("runtime", self.name) == self.name else ""
        runtime = version if re.match(r"\d+\.\d+", version) else self._runtime
        numbers = self._numbers
        if told.get("architecture"):
            numbers = Int8Numbers.of(str(told["architecture"]), told.get("isa") or ())
        if (runtime, numbers) == (self._runtime, self._numbers):
            return self
        return OnnxRuntime(runtime, self._precision, numbers)

    def for_precision(self, precision: Precision) -> OnnxRuntime:
        """See `Backend.for_precision`."""
        super().for_precision(precision)
        return OnnxRuntime(self._runtime, precision, self._numbers)

    def calibrated(self, cases: Sequence[Case], *, needed_db: float, told: Told | None = None) -> OnnxRuntime:
        """See `Backend.calibrated`."""
        if self._precision != "int8":
            return super().calibrated(cases, needed_db=needed_db, told=told)  # type: ignore[return-value]  # it raises
        made = OnnxRuntime(self._runtime, self._precision, self._numbers)
        made._calibration = (cases, needed_db, told)
        return made

    def for_timing(self) -> OnnxRuntime:
        """See `Backend.for_timing`."""
        made = OnnxRuntime(self._runtime, self._precision, self._numbers)
        made._for_timing = True
        return made

    def availability(self) -> str | None:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        return f"missing: {', '.join(missing)}" if missing else None

    def requirements(self, fingerprint: Fingerprint, needs: Mapping[str, Any] | None = None) -> list[Requirement]:
        found = fingerprint.runtimes.get(self.name, {}).get("version")
        needs = needs or {}
        wanted = [_OLDEST, str(needs.get("min_version") or _OLDEST)]
        why = ""
        if "opset" in needs and "ir_version" in needs:
            opset, ir_version = int(needs["opset"]), int(needs["ir_version"])
            wanted.append(oldest_reader(opset, ir_version))
            why = f" to read opset {opset} and IR version {ir_version}"
        oldest = max(wanted, key=_version)
        met = found is not None and _version(found) >= _version(oldest)
        hint = SETUP
        if found is not None and _version(found) >= _version(_OLDEST) and why:
            hint = f"{SETUP}, or compile it for what the board has: edgeprune compile --board BOARD"
        return [Requirement("onnxruntime", f">= {oldest}{why}", found or "none", met, hint)]

    def board_packages(self, version: str | None = None) -> tuple[tuple[str, ...], ...]:
        """See `Backend.board_packages`: this host's version, whose kernels it can tell beforehand, or the newest that fits."""
        if version is None:
            from edgeprune.backends.onnxruntime.runtime import onnxruntime

            return ((f"onnxruntime=={onnxruntime.__version__}",), (f"onnxruntime>={_OLDEST}",))
        if not re.fullmatch(r"\d+(\.\d+)+([.a-z0-9]*)", version) or _version(version) < _version(_OLDEST):
            raise ConfigError(
                f"the runtime's version must be one of ONNX Runtime from {_OLDEST} on, found {version!r}.",
                hint="--runtime-version 1.20.1",
            )
        pinned = f"onnxruntime=={version}"
        return ((pinned, "numpy<2"),) if _version(version) < _version(_FIRST_WITH_NUMPY_2) else ((pinned,),)

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

        if self._precision != "int8":
            return exporting.export(module, example_inputs, path, self.versions)
        if self._calibration is None and not self._for_timing:
            raise ConfigError("int8 engines need calibration data, found none.", hint=CALIBRATION)
        from edgeprune.backends.onnxruntime.quantizing import quantize, quantize_for_timing

        with tempfile.TemporaryDirectory(prefix="edgeprune-int8-") as folder:
            exact = Path(folder) / f"float{self.suffix}"
            specs = exporting.export(module, example_inputs, exact, self.versions)
            if self._calibration is None:
                case = tuple(tensor.detach().cpu().numpy() for tensor in example_inputs)
                quantize_for_timing(exact, case, path, numbers=self.numbers)
            else:
                cases, needed_db, told = self._calibration
                quantize(exact, cases, path, needed_db=needed_db, numbers=self.numbers, told=told)
        return specs

    def quantization(self, engine: Path) -> dict[str, Any] | None:
        """See `Backend.quantization`."""
        from edgeprune.backends.onnxruntime.quantizing import quantization

        found = quantization(engine)
        return None if found is None else found.facts()

    def session(self, engine: Path, threads: int = 1) -> Session:
        """See `Backend.session`."""
        from edgeprune.backends.onnxruntime.runtime import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        opened = onnxruntime.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in opened.get_inputs()]
        return lambda arrays: list(opened.run(None, dict(zip(names, arrays, strict=True))))

    def operators(self, engine: Path) -> OperatorGraph:
        from edgeprune.backends.onnxruntime import engines, int8_graph

        return int8_graph.operators(engine) if self._precision == "int8" else engines.operators(engine)

    def infer_shapes(
        self, operator: Operator, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]] | None:
        """See `Backend.infer_shapes`."""
        from edgeprune.backends.onnxruntime import int8_graph
        from edgeprune.backends.onnxruntime.shapes import inferred

        if self._precision == "int8":
            return int8_graph.infer_shapes(operator, graph, shapes)
        return inferred(operator, graph.shapes, shapes)

    def tiled(
        self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]], layouts: Mapping[str, TileLayout]
    ) -> tuple[OperatorGraph, dict[str, tuple[int, ...]]]:
        """See `Backend.tiled`."""
        if self._precision == "int8":
            raise UnsupportedKernelError("layers with tiles must be in fp32 to be told beforehand, found int8.")
        from edgeprune.backends.onnxruntime.tiling import tiled

        return tiled(graph, shapes, layouts)

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
        from edgeprune.backends.onnxruntime import engines, int8_graph

        return int8_graph.parse(engine) if self._precision == "int8" else engines.parse(engine)

    def labels(self, engine: Path) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """See `Backend.labels`."""
        import onnx

        from edgeprune.backends.onnxruntime.exporting import module_paths, modules_behind

        # Fused kernels are named after a node or after what they make.
        model = onnx.load(str(engine), load_external_data=False)
        return {}, {**modules_behind(model), **module_paths(model)}

    def kernel_engine(self, kernel: Kernel) -> bytes:
        from edgeprune.backends.onnxruntime import engines, int8_graph

        if kernel.precision == "int8":
            return int8_graph.kernel_engine(kernel, self.numbers, self.versions)
        return engines.kernel_engine(kernel, self.versions)

    def network_engine(self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
        from edgeprune.backends.onnxruntime import engines, int8_graph

        if self._precision == "int8":
            return int8_graph.network_engine(graph, shapes, self.numbers, self.versions)
        return engines.network_engine(graph, shapes, self.versions)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
