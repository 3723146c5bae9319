"""The TensorRT backend."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgeprune.backends._base import CALIBRATION, Backend, Case, LayerTimes, Operator, OperatorGraph, Session, Told
from edgeprune.backends.tensorrt import building, versions
from edgeprune.backends.tensorrt.flags import BuildOptions
from edgeprune.backends.tensorrt.layer_times import BuiltLayer, built_layers, group_times, unquantized
from edgeprune.errors import BackendError, CompileError, ConfigError, UnsupportedKernelError
from edgeprune.files import sha256_of, write_text
from edgeprune.spec import Fingerprint, Kernel, Precision, Requirement, TensorSpec

if TYPE_CHECKING:
    import torch

    from edgeprune.backends.tensorrt import fusing
    from edgeprune.boards.board import Board

_REMEMBERED = 32
"""Sets of operators whose fusions are remembered."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


class TensorRt(Backend):
    """Engines that TensorRT builds on the board itself, from ONNX, with its ``trtexec``.

    An engine is bound to its release and GPU, and the same build twice gives different bytes, so what identifies one is the
    hash of its own file. Beside it lies ``tensorrt.json``: the commands, trtexec's times, and the layers joined to the
    model's nodes.

    What it computes as one layer is told beforehand by its fusions (`edgeprune.backends.tensorrt.fusing`). Kernels are timed as
    layers of whole networks, which trtexec does one by one: alone they would be surrounded by other layouts.

    Everything here was checked against recorded exports and logs and a stand-in that has the options of NVIDIA's public
    sources: no GPU ran it yet.

    Args:
        dla_core: A Jetson's deep learning accelerator to build for, in fp16 or int8, with the GPU for what it does not take.
        workspace_mib: Bound of the memory that a tactic may use, MiB.
    """

    name: ClassVar[str] = "tensorrt"
    install: ClassVar[str] = "pip install 'edgeprune[onnxruntime]'"
    suffix: ClassVar[str] = ".plan"
    portable: ClassVar[bool] = False
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "fp16", "int8")
    layer_times: ClassVar[LayerTimes | None] = LayerTimes(
        build_s=60.0,
        timing_s=8.0,
        what="trtexec's times on the device, without transfers, warmed up for 0.2 s or more: of whole queries in a CUDA "
        "graph, and of layers one by one",
    )

    def __init__(self, *, dla_core: int | None = None, workspace_mib: int | None = None) -> None:
        self._dla_core, self._workspace_mib = dla_core, workspace_mib
        self._precision: Precision = "fp32"
        self._board: Board | None = None
        self._calibration: tuple[Sequence[Case], float, Told | None] | None = None
        self._quantized: bytes | None = None
        self._for_timing = False
        # What the builder said of the networks that were built to be timed, by the hash of the engine.
        self._built: dict[str, tuple[BuiltLayer, ...]] = {}
        self._groups: dict[Any, list[fusing.Group]] = {}

    @property
    def options(self) -> BuildOptions:
        """How engines are built.

        Raises:
            ConfigError: Precision, DLA core and workspace contradict each other.
        """
        return BuildOptions(self._precision, self._dla_core, self._workspace_mib)

    @property
    def precision(self) -> Precision:
        """See `Backend.precision`."""
        return self._precision

    def for_precision(self, precision: Precision) -> TensorRt:
        """See `Backend.for_precision`."""
        super().for_precision(precision)
        return self._with(precision, self._board)

    def built_on(self, board: Board) -> TensorRt:
        """See `Backend.built_on`."""
        return self._with(self._precision, board)

    def calibrated(self, cases: Sequence[Case], *, needed_db: float, told: Told | None = None) -> TensorRt:
        """See `Backend.calibrated`."""
        if self._precision != "int8":
            return super().calibrated(cases, needed_db=needed_db, told=told)  # type: ignore[return-value]  # it raises
        made = self._with(self._precision, self._board)
        made._calibration = (cases, needed_db, told)
        return made

    def _with(self, precision: Precision, board: Board | None) -> TensorRt:
        made = TensorRt(dla_core=self._dla_core, workspace_mib=self._workspace_mib)
        made._precision, made._board, made._calibration = precision, board, self._calibration
        made._for_timing = self._for_timing and precision == self._precision
        return made

    def for_timing(self) -> TensorRt:
        """See `Backend.for_timing`."""
        made = self._with(self._precision, self._board)
        made._for_timing = True
        return made

    def availability(self) -> str | None:
        missing = [name for name in _NEEDED if find_spec(name) is None]
        return f"missing: {', '.join(missing)}" if missing else None

    def requirements(self, fingerprint: Fingerprint, needs: Mapping[str, Any] | None = None) -> list[Requirement]:
        """See `Backend.requirements`. An engine needs exactly the release and the GPU that it was built by and for."""
        told = fingerprint.runtimes.get(self.name, {}).get("version")
        found = told or "none"
        needed = (needs or {}).get("tensorrt")
        if needed is None:
            met = told is not None and any(one.oldest <= versions.parse(told) < one.end for one in versions.DIALECTS)
            hint = "JetPack, or apt-get install libnvinfer-bin (on the board)"
            return [Requirement(self.name, versions.SUPPORTED, found, met, hint)]
        rebuild = "edgeprune compile --backend tensorrt --board BOARD, on this very board"
        items = [Requirement(self.name, f"{needed}, which built it", found, told == needed, rebuild)]
        here = building.gpu_of(fingerprint)
        for field in ("gpu", "compute_capability"):
            if field in (needs or {}):
                wanted, have = str((needs or {})[field]), here.get(field, "unknown")
                items.append(Requirement(field, wanted, have, wanted == have, rebuild))
        machine = (needs or {}).get("machine")
        if machine is not None:
            have = str(fingerprint.facts.get("machine", "unknown"))
            items.append(Requirement("machine", f"{machine}, whose DLA it is for", have, machine == have, rebuild))
        return items

    def needs(self, engine: Path) -> dict[str, Any]:
        """Release and GPU that an engine is bound to."""
        record = _record(engine)
        return {key: record[key] for key in ("tensorrt", "gpu", "compute_capability", "machine") if key in record}

    def runs_here(self, engine: Path) -> bool:
        """See `Backend.runs_here`: an engine runs on the board that built it, and is checked there."""
        return False

    def session(self, engine: Path, threads: int = 1) -> Session | None:
        """Runs the model with quantize nodes that this backend has just built an int8 engine from, by ONNX Runtime.

        The engine itself only runs on its board. Both compute what the nodes say, in another order and with other rounding
        where TensorRT fuses; what the board's numbers are the golden data tell there. None of other engines.
        """
        if self._quantized is None:
            return None
        from edgeprune.backends.onnxruntime.runtime import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        opened = onnxruntime.InferenceSession(self._quantized, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in opened.get_inputs()]
        return lambda arrays: list(opened.run(None, dict(zip(names, arrays, strict=True))))

    def quantization(self, engine: Path) -> dict[str, Any] | None:
        """See `Backend.quantization`; from the record beside the engine."""
        found: dict[str, Any] | None = _record(engine).get("quantization")
        return found

    def export(
        self, module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], path: Path
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """See `Backend.export`. Writes ``tensorrt.json`` beside the engine.

        Raises:
            ExportError: The module cannot be exported to ONNX of the board's opset.
            CompileError: No board was named, or its TensorRT cannot build the engine.
            BackendUnavailableError: The board has neither trtexec nor TensorRT's Python module.
            ConfigError: Precision and DLA core contradict each other, or int8 has no calibration data.
        """
        from edgeprune.backends.onnxruntime import exporting

        board = self._on_board()
        version = building.version_on(board)
        if self.options.dla_core is not None:
            versions.require_dla(version, self._precision)
        if self.options.precision == "int8" and self._calibration is None and not self._for_timing:
            raise ConfigError("int8 engines need calibration data, found none.", hint=CALIBRATION)
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
            source = Path(folder) / "model.onnx"
            inputs, outputs = exporting.export(module, example_inputs, source)
            self._build(board, version, source, path)
        return inputs, outputs

    def export_source(
        self, module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], path: Path
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """See `Backend.export_source`: ONNX, from which any board builds."""
        from edgeprune.backends.onnxruntime import exporting

        return exporting.export(module, example_inputs, path)

    def engine_of(self, source: Path, path: Path) -> Path:
        """See `Backend.engine_of`; builds it on the board.

        Raises:
            CompileError: No board was named, or its TensorRT cannot build the engine.
        """
        board = self._on_board()
        self._build(board, building.version_on(board), source, path)
        return path

    def _on_board(self) -> Board:
        if self._board is None:
            raise CompileError(
                "a TensorRT engine must be built on the board that runs it, found no board to build on.",
                hint="edgeprune compile --backend tensorrt --board BOARD",
            )
        return self._board

    def _build(self, board: Board, version: versions.Version, source: Path, path: Path) -> None:
        """Build the engine of an exported model, and leave its record beside it."""
        import onnx

        from edgeprune.backends.tensorrt import model, scales

        options, exported = self.options, onnx.load(source)
        ready = model.prepared(exported, versions.dialect(version), self._precision)
        quantization, told = None, None
        if self._calibration is not None:
            noded, quantization = model.quantized(ready, *self._calibration)
            self._quantized = noded.SerializeToString()
            if options.dla_core is None:
                ready = noded
            else:
                told = scales.of(noded, version)
        elif self._precision == "int8":
            ready = model.quantized_for_timing(ready)
        source_model = building.Model(ready.SerializeToString(), model.operations(ready), model.origins(exported), told)
        fingerprint = board.probe()
        gpu = building.gpu_of(fingerprint)
        record = building.build(board, version, source_model, options, path, gpu=gpu)
        record |= {**gpu, "quantization": quantization}
        if options.dla_core is not None and "machine" in fingerprint.facts:
            # Which core it is for stands on the board that built it, and in no file that travels.
            record["machine"] = fingerprint.facts["machine"]
        write_text(path.with_name(building.RECORD_NAME), json.dumps(record, indent=1, sort_keys=True) + "\n")

    def parse_engine(self, engine: Path) -> list[Kernel]:
        """See `Backend.parse_engine`: the layers of the engine as its builder exported them, from the record beside it.

        Raises:
            BackendError: There is no record of this engine, or its layers could not be read.
        """
        record = _record(engine)
        if record.get("engine_sha256") != sha256_of(engine):
            raise BackendError(
                f"{building.RECORD_NAME} must be the record of {engine.name}, found that of another engine.",
                hint="edgeprune compile --backend tensorrt --board BOARD",
            )
        if not record.get("kernels"):
            raise BackendError(
                f"{building.RECORD_NAME} must list the layers of {engine.name}, found none.",
                hint="edgeprune compile --backend tensorrt --board BOARD --verbose",
            )
        return [Kernel.from_key(entry["kernel"]) for entry in record["kernels"]]

    def labels(self, engine: Path) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """See `Backend.labels`; from the record beside the engine."""
        rows = _record(engine).get("kernels") or ()
        return {row["layer"]: Kernel.from_key(row["kernel"]).op for row in rows}, {}

    def operators(self, engine: Path) -> OperatorGraph:
        """See `Backend.operators`, of what `export_source` wrote. Batch norms are folded; which operators one layer computes,
        `layout_rule` tells.
        """
        from edgeprune.backends.onnxruntime import engines

        return engines.operators(engine, "BASIC")

    def infer_shapes(
        self, operator: Operator, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]] | None:
        """See `Backend.infer_shapes`."""
        from edgeprune.backends.onnxruntime.shapes import inferred

        return inferred(operator, graph.shapes, shapes)

    def layout_rule(
        self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]], architecture: str, isa: Sequence[str]
    ) -> list[Kernel]:
        """See `Backend.layout_rule`. Which layouts and tactics the builder chooses at some widths is not told by a kernel."""
        from edgeprune.backends.tensorrt import fusing

        return fusing.kernels(graph, shapes, self._groups_of(graph), self._precision)

    def kernel_engine(self, kernel: Kernel) -> bytes:
        """Refused: alone a kernel has layouts to bring about that are there in a network; see `layer_kernels`."""
        raise UnsupportedKernelError(
            f"kernels of TensorRT must be timed as layers of networks, found {kernel.op} by itself.",
            hint="edgeprune profile --backend tensorrt",
        )

    def network_engine(self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
        """See `Backend.network_engine`; builds it on the board.

        Raises:
            CompileError: No board was named, or its TensorRT cannot build the engine.
        """
        from edgeprune.backends.tensorrt import model

        board = self._on_board()
        version = building.version_on(board)
        ready = model.prepared(model.network(graph, shapes), versions.dialect(version), self._precision)
        if self._precision == "int8":
            ready = model.quantized_for_timing(ready)
        source = building.Model(ready.SerializeToString(), model.operations(ready), {})
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
            path = Path(folder) / "engine.plan"
            record = building.build(board, version, source, self.options, path, timed=False)
            content = path.read_bytes()
        self._built[record["engine_sha256"]] = unquantized(built_layers(record), model.served(ready))
        return content

    def layer_kernels(
        self,
        engine: bytes,
        graph: OperatorGraph,
        shapes: Mapping[str, tuple[int, ...]],
        layers: Sequence[tuple[str, float]],
    ) -> list[tuple[Kernel, float]]:
        """See `Backend.layer_kernels`."""
        from edgeprune.backends.tensorrt import fusing

        groups = self._groups_of(graph)
        kernels = fusing.kernels(graph, shapes, groups, self._precision)
        built = self._built.get(hashlib.sha256(engine).hexdigest(), ())
        times = group_times(built, layers, groups)
        return [(kernels[place], ms) for place, ms in sorted(times.items())]

    def _groups_of(self, graph: OperatorGraph) -> list[fusing.Group]:
        from edgeprune.backends.tensorrt import fusing

        key = tuple((operator.name, operator.op, operator.inputs, operator.outputs) for operator in graph.operators)
        if key not in self._groups:
            while len(self._groups) >= _REMEMBERED:
                del self._groups[next(iter(self._groups))]
            self._groups[key] = fusing.groups(graph)
        return self._groups[key]


def _record(engine: Path) -> dict[str, Any]:
    path = engine.with_name(building.RECORD_NAME)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackendError(
            f"an engine of TensorRT must lie beside its {building.RECORD_NAME}, found none that can be read.",
            hint="edgeprune compile --backend tensorrt --board BOARD",
        ) from error
    if not isinstance(found, dict) or found.get("format") != building.RECORD_FORMAT:
        raise BackendError(
            f"{building.RECORD_NAME} must have format {building.RECORD_FORMAT}, found another.",
            hint="compile again with this edgeprune",
        )
    return found
