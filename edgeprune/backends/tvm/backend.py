"""The TVM backend."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgeprune.backends._base import Backend, Operator, OperatorGraph
from edgeprune.backends.tvm import engine_file
from edgeprune.backends.tvm.target import SERIES, TvmTarget, target_of
from edgeprune.backends.tvm.tuning import Tuning
from edgeprune.boards.installing import SETUP
from edgeprune.boards.local import LocalTransport
from edgeprune.errors import CompileError, ConfigError, EmulatedProcessorError, IncompatibleTargetError
from edgeprune.files import replacing
from edgeprune.spec import Fingerprint, Kernel, Precision, Requirement, TensorSpec

if TYPE_CHECKING:
    import onnx
    import torch

    from edgeprune.boards.board import Board

_PACKAGES = ("apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1")
_NEEDED = ("tvm", "tvm_ffi", "onnx", "onnxscript", "onnxruntime")
_REMEMBERED = 64
FRONTENDS = ("onnx", "program")
"""What a deployed engine can be made from."""


class Tvm(Backend):
    """Networks compiled ahead of time by TVM, run by its virtual machine on the CPU.

    Args:
        target: What engines are compiled for; None means this host. See `for_board`.
        tuning: Search schedules before an engine is exported for deployment, and what that may take.
        searched: Take the schedules of the database, where there are some. See `for_deployment`.
        precision: Of the engines. See `for_precision`.
        frontend: What engines that are deployed are made from: ``"onnx"``, or ``"program"``, torch's exported program without
            ONNX between. Then nothing is folded before TVM does so, and kernels are not known by their layers.

    Raises:
        ConfigError: There is no such frontend.
    """

    name: ClassVar[str] = "tvm"
    install: ClassVar[str] = "pip install 'edgeprune[tvm]'"
    suffix: ClassVar[str] = ".so"
    portable: ClassVar[bool] = False
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "fp16")

    def __init__(
        self,
        target: TvmTarget | None = None,
        tuning: Tuning | None = None,
        searched: bool = False,
        precision: Precision = "fp32",
        frontend: str = "onnx",
    ) -> None:
        if frontend not in FRONTENDS:
            raise ConfigError(f"the frontend must be one of {', '.join(FRONTENDS)}, found {frontend!r}.")
        self._frontend = frontend
        self._target, self._tuning, self._searched, self._precision = target, tuning, searched, precision
        self._groups: dict[tuple[Any, ...], list[tuple[str, ...]]] = {}

    @property
    def target(self) -> TvmTarget:
        """What engines are compiled for.

        Raises:
            CompileError: It is this host, and its architecture is not supported.
        """
        if self._target is None:
            self._target = target_of(None)
        return self._target

    def for_board(self, device: Fingerprint | Mapping[str, Any] | None) -> Tvm:
        """The backend that compiles for a board: its architecture, its core, and the instruction sets that it told.

        Raises:
            CompileError: TVM engines are not made for its architecture.
            IncompatibleTargetError: Schedules are to be searched, which takes long, for a board that cannot run the engine.
            EmulatedProcessorError: They are to be searched where nothing that is timed means anything.
        """
        if self._tuning is not None and isinstance(device, Fingerprint):
            if device.facts.get("emulated"):
                raise EmulatedProcessorError(
                    f"candidates must be timed on a real processor, found an emulated {device.architecture}.",
                    hint="compile without --tune",
                )
            for item in self.requirements(device, {"series": SERIES}):
                if not item.met:
                    raise IncompatibleTargetError(item.field, item.needed, item.found, hint=item.hint)
        return Tvm(target_of(device), self._tuning, self._searched, self._precision, self._frontend)

    @property
    def exports_onnx(self) -> bool:
        """See `Backend.exports_onnx`."""
        return self._frontend == "onnx"

    @property
    def precision(self) -> Precision:
        """See `Backend.precision`."""
        return self._precision

    def for_precision(self, precision: Precision) -> Tvm:
        """See `Backend.for_precision`."""
        super().for_precision(precision)
        return Tvm(self._target, self._tuning, self._searched, precision, self._frontend)

    def for_timing(self) -> Tvm:
        """See `Backend.for_timing`.

        Raises:
            ConfigError: In fp16: its kernels are not known by themselves.
        """
        if self._precision != "fp32":
            raise ConfigError(
                f"profile and prune take engines of TVM in fp32, found precision {self._precision}.",
                hint="--precision fp32, and compile --precision fp16",
            )
        return self

    @property
    def tuning(self) -> Tuning | None:
        """What is searched before an engine is exported for deployment."""
        return self._tuning

    def with_tuning(self, tuning: Tuning) -> Tvm:
        """The backend that searches what another tuning says."""
        return Tvm(self._target, tuning, self._searched, self._precision, self._frontend)

    def for_deployment(self) -> Tvm:
        """See `Backend.for_deployment`: with the schedules of the tuning database, after tuning where that was asked for."""
        return Tvm(self._target, self._tuning, True, self._precision, self._frontend)

    def built_on(self, board: Board) -> Tvm:
        """See `Backend.built_on`: candidates of tuning are timed on that board, unless it is this machine."""
        if self._tuning is None or isinstance(board.transport, LocalTransport):
            return self
        return self.with_tuning(replace(self._tuning, board=board))

    def searched(self, engine: Path) -> tuple[int, int]:
        """How many functions of an engine have a schedule that search has found, and how many there are."""
        told = engine_file.description_of(engine)
        known = any(key is not None for _, key in told["calls"])
        functions = {function for function, key in told["calls"] if function and (key is not None or not known)}
        return len(told.get("searched", ())), len(functions)

    def availability(self) -> str | None:
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            return f"missing: {', '.join(missing)}"
        try:
            version = metadata.version("apache-tvm")
        except metadata.PackageNotFoundError:
            return "missing: the package apache-tvm, found a tvm that was not installed as one"
        if not version.startswith(f"{SERIES}."):
            return f"apache-tvm must be {SERIES}, found {version}"
        if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
            return "missing: a C compiler, which links engines (apt-get install gcc)"
        return None

    def requirements(self, fingerprint: Fingerprint, needs: Mapping[str, Any] | None = None) -> list[Requirement]:
        """See `Backend.requirements`. An engine runs with the series of TVM that made it, and needs glibc's functions."""
        found = fingerprint.runtimes.get(self.name, {}).get("version")
        series = (needs or {}).get("series")
        hint = f"{SETUP} --backend tvm"
        if series is None:
            met = found is not None and _numbers(found) >= _numbers(SERIES)
            items = [Requirement("tvm", f">= {SERIES}", found or "none", met, hint)]
        else:
            met = found is not None and _numbers(found)[:2] == _numbers(str(series))
            items = [Requirement("tvm", f"{series}.x, which compiled it", found or "none", met, hint)]
        glibc = str((needs or {}).get("glibc", "0"))
        if glibc != "0":
            name, _, version = fingerprint.libc.partition(" ")
            met = name == "glibc" and _numbers(version) >= _numbers(glibc)
            told = "compile on a host whose glibc is as old as the board's"
            items.append(Requirement("libc", f"glibc >= {glibc}", fingerprint.libc, met, told))
        return items

    def board_packages(self, version: str | None = None) -> tuple[tuple[str, ...], ...]:
        """See `Backend.board_packages`: the pair that was tried together."""
        if version is None:
            return (_PACKAGES,)
        if _numbers(version)[:2] != _numbers(SERIES):
            raise ConfigError(f"the runtime's version must be one of TVM {SERIES}, found {version!r}.")
        return ((f"apache-tvm=={version}", *_PACKAGES[1:]),)

    def needs(self, engine: Path) -> dict[str, Any]:
        """Architecture, instruction sets, series of TVM and glibc that an engine was compiled for."""
        told = engine_file.description_of(engine)
        return {key: told[key] for key in ("architecture", "isa", "series", "glibc")}

    def runs_here(self, engine: Path) -> bool:
        """See `Backend.runs_here`: not what was compiled for another architecture, or for flags that this host lacks."""
        told = engine_file.description_of(engine)
        return TvmTarget(told["architecture"], "", (), tuple(told["isa"])).runs_here

    def export(
        self, module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], path: Path
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """See `Backend.export`. Weights are inside.

        Raises:
            ExportError: The module cannot be exported to ONNX.
            CompileError: TVM or the linker refuses it, or the processor has no half precision.
        """
        from edgeprune.backends.onnxruntime import engines, exporting

        if self._precision == "fp16":
            self.target.require_half()
        if self._frontend == "program":
            return self._export_program(module, example_inputs, path)
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
            source = Path(folder) / "model.onnx"
            inputs, outputs = exporting.export(module, example_inputs, source)
            # Folds batch norms and constants; everything stays plain ONNX.
            model = engines.optimized(source, "BASIC")
            graph = engines.operators(source, "BASIC")
        names = _names(model, graph)
        if self._precision == "fp16":
            from edgeprune.backends.onnxruntime.half import in_half

            model = in_half(model)
        content = self._built(model, graph, inputs, outputs, weights_inside=True, names=names, searched=self._searched)
        with replacing(path) as partial:
            partial.write_bytes(content)
        return inputs, outputs

    def _export_program(
        self, module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], path: Path
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        from edgeprune.backends.tvm import building, describing, importing, programs

        if self._precision != "fp32":
            raise ConfigError(
                f"engines of torch's program must be fp32, found precision {self._precision}.", hint="--frontend onnx"
            )
        program, inputs, outputs = programs.exported(module, example_inputs)
        library = building.built(
            importing.fused_program(program, self.target),
            None,
            self.target,
            weights_inside=True,
            searched=self._searched,
            tuning=self._tuning if self._searched else None,
        )
        nothing = OperatorGraph((), inputs, tuple(spec.name for spec in outputs), {}, {})
        made = [None] * len(library.functions)
        with replacing(path) as partial:
            partial.write_bytes(describing.described(library, self.target, inputs, outputs, made, nothing))
        return inputs, outputs

    def operators(self, engine: Path) -> OperatorGraph:
        """See `Backend.operators`. Operators stand one by one: which of them one function computes, `layout_rule` tells."""
        from edgeprune.backends.tvm import kernels

        return kernels.from_json(engine_file.description_of(engine)["graph"])

    def infer_shapes(
        self, operator: Operator, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]] | None:
        """See `Backend.infer_shapes`."""
        from edgeprune.backends.onnxruntime.shapes import inferred

        return inferred(operator, graph.shapes, shapes)

    def layout_rule(
        self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]], architecture: str, isa: Sequence[str]
    ) -> list[Kernel]:
        """See `Backend.layout_rule`.

        Which operators become one function is asked from TVM's own fusion, once per set of operators: it goes by what they
        are and how they are wired, not by widths. Nothing is compiled. TVM keeps NCHW, so no layout depends on the board.
        """
        from edgeprune.backends.tvm import kernels

        key = tuple((operator.name, operator.op, operator.inputs, operator.outputs) for operator in graph.operators)
        if key not in self._groups:
            from edgeprune.backends.tvm import importing

            model = _network(graph, graph.shapes)
            names = _names(model, graph)
            _, calls = importing.fused(model, self.target)
            while len(self._groups) >= _REMEMBERED:
                del self._groups[next(iter(self._groups))]
            self._groups[key] = [tuple(names[node] for node in call) for call in calls]
        return [kernel for kernel in kernels.kernels(graph, shapes, self._groups[key]) if kernel is not None]

    def parse_engine(self, engine: Path) -> list[Kernel]:
        """See `Backend.parse_engine`: one run on this host, whose calls the virtual machine tells.

        Raises:
            CompileError: It is no engine of this backend, or not one for this host.
        """
        from edgeprune.backends.tvm.executing import executed

        told = engine_file.description_of(engine)
        if not self.runs_here(engine):
            raise CompileError(
                f"{engine.name} must be compiled for this host to be run here, found {told['architecture']} with "
                f"{' '.join(told['isa'])}.",
            )
        calls = [(function, key) for function, key in told["calls"] if key is not None]
        ran = [name for name in executed(engine, told) if name in {function for function, _ in calls}]
        if ran != [function for function, _ in calls]:
            raise CompileError(
                f"{engine.name} must call the functions that its description lists, found {len(ran)} calls, "
                f"listed {len(calls)}.",
                hint="compile it again",
            )
        return [Kernel.from_key(key) for _, key in calls]

    def labels(self, engine: Path) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """See `Backend.labels`."""
        calls = engine_file.description_of(engine)["calls"]
        return {function: Kernel.from_key(key).op for function, key in calls if key is not None}, {}

    def kernel_engine(self, kernel: Kernel) -> bytes:
        """See `Backend.kernel_engine`. Weights are inputs, so the file stays small; the function is the network's."""
        from edgeprune.backends.tvm import kernels

        graph = kernels.graph_of(kernel)
        return self.network_engine(graph, graph.shapes)

    def network_engine(self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
        """See `Backend.network_engine`. Weights are inputs."""
        from edgeprune.backends.onnxruntime.exporting import _specs

        model = _network(graph, shapes)
        inputs, outputs = _specs(model.graph.input), _specs(model.graph.output)
        resized = OperatorGraph(graph.operators, inputs, graph.outputs, dict(shapes), graph.sources, graph.dtypes)
        return self._built(model, resized, inputs, outputs, weights_inside=False, names=_names(model, graph))

    def _built(
        self,
        model: onnx.ModelProto,
        graph: OperatorGraph,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        weights_inside: bool,
        names: Mapping[str, str],
        searched: bool = False,
    ) -> bytes:
        """The engine file of a model whose shapes `graph` tells."""
        from edgeprune.backends.tvm import building, describing, importing, kernels

        target = self.target
        module, calls = importing.fused(model, target)
        library = building.built(
            module,
            len(calls),
            target,
            weights_inside=weights_inside,
            searched=searched,
            tuning=self._tuning if searched else None,
        )
        # What only turns numbers into half precision and back is of no operator.
        exact = self._precision == "fp32"
        groups = [[names[node] for node in call if exact or node in names] for call in calls]
        made = kernels.kernels(graph, graph.shapes, groups, self._precision)
        return describing.described(library, target, inputs, outputs, made, graph)


def _network(graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """The operators as a plain ONNX model at other widths, with meaningless weights."""
    import onnx

    from edgeprune.backends.onnxruntime import engines
    from edgeprune.backends.onnxruntime.literals import with_literals

    return with_literals(onnx.load_from_string(engines.network_engine(graph, shapes)))


def _names(model: onnx.ModelProto, graph: OperatorGraph) -> dict[str, str]:
    """Name of a node in the model to name of the operator that it stands for: the one with the same first output."""
    by_output = {operator.outputs[0]: operator.name for operator in graph.operators}
    return {node.name: by_output[node.output[0]] for node in model.graph.node}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
