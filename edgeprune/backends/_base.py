"""The one interface behind which ONNX Runtime, TVM and TensorRT stand.

A backend turns a module into an engine on the host, says which kernels the runtime will execute, and says what a board
must have. What the board itself runs is a plain command with JSON in and out (`edgeprune.boards.onboard`), so a backend
can be tested by replay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgeprune.errors import ConfigError, UnsupportedKernelError
from edgeprune.spec import AttributeValue, Fingerprint, Kernel, Precision, Requirement, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgeprune.boards.board import Board
    from edgeprune.surgery.tile_layout import TileLayout


CALIBRATION = "--task FACTORY, whose training data are taken; golden_inputs= in Python"
"""Where calibration data come from, as a hint."""
Case = tuple["np.ndarray[Any, Any]", ...]
"""One run of an engine: an array per input, in the engine's order."""
Session = Callable[[Sequence["np.ndarray[Any, Any]"]], "list[np.ndarray[Any, Any]]"]
"""One inference: arrays of the inputs to arrays of the outputs, both in the engine's order."""
Told = Callable[[str], None]


@dataclass(frozen=True)
class Operator:
    """One operation of a runtime's graph before it chooses layouts; shapes are concrete.

    Attributes:
        name: Unique name of the node.
        op: Operation, domain first where it has one.
        inputs: Names of the data inputs in order; graph inputs, operator outputs, or constants that are no weights.
        outputs: Names of the outputs.
        attributes: As in `Kernel.attributes`; weights and small constants are told here, not in `inputs`.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, AttributeValue], ...]


@dataclass(frozen=True)
class OperatorGraph:
    """What a runtime makes of a dense model before it chooses layouts: fusions that do not depend on widths are done.

    Attributes:
        operators: In an order in which they can run.
        inputs: Graph inputs.
        outputs: Names of the graph outputs.
        shapes: Name of every tensor in the operators' inputs and outputs to its dense shape.
        sources: Tensor name to the name of the traced program's node that it is the value of, where known.
        dtypes: Tensor name to NumPy name of its type, where it is not ``"float32"``.
        notes: Tensor name to what else the backend's own layout rule needs to know of it.
    """

    operators: tuple[Operator, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    sources: Mapping[str, str]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerTimes:
    """How a runtime times engines that only run in processes of their own, and says what each of their layers took.

    Attributes:
        build_s: What building the engine of one network takes about, seconds, before one was built.
        timing_s: What one timing of one engine takes about, seconds, its start and its end counted.
        what: What its times are, in a sentence for a table's header.
    """

    build_s: float
    timing_s: float
    what: str


class Backend(ABC):
    """A compiler and runtime. Methods run on the host and need the backend's host package only where they say so."""

    name: ClassVar[str]
    install: ClassVar[str]
    """The command that installs what the host needs."""
    suffix: ClassVar[str]
    """Of engine files, e.g. ``".onnx"``."""
    portable: ClassVar[bool] = True
    """Whether one engine file runs on boards of any kind; if not, `for_board` says which it is compiled for."""
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32",)
    """Precisions that it can compile for."""
    layer_times: ClassVar[LayerTimes | None] = None
    """Where engines run in processes of their own: kernels are then timed as layers of whole networks, see `layer_kernels`."""

    @abstractmethod
    def availability(self) -> str | None:
        """None when the host has what `export` and `operators` need, else one sentence that says what is missing."""

    @abstractmethod
    def requirements(self, fingerprint: Fingerprint, needs: Mapping[str, Any] | None = None) -> list[Requirement]:
        """What a board must have to run engines of this backend, each with whether `fingerprint` has it.

        Args:
            fingerprint: The board as probed.
            needs: The ``requires`` block of an artifact, when one is about to be deployed.
        """

    def board_packages(self, version: str | None = None) -> tuple[tuple[str, ...], ...]:
        """What `edgeprune device setup` installs on a board, as pip takes it: alternatives, best first; empty if it cannot.

        The first of each alternative is the runtime. The others are what its wheel needs and does not say.

        Args:
            version: Of the runtime; the backend's own choice when None.

        Raises:
            ConfigError: The version is none that engines are made for.
        """
        return ()

    def for_board(self, device: Fingerprint | Mapping[str, Any] | None) -> Backend:
        """The backend whose engines are for one board. Where engines run on any board, that is the backend itself.

        Args:
            device: A probed board, the ``identity`` of one (`Fingerprint.identity`), or None for this host.
        """
        return self

    @property
    def exports_onnx(self) -> bool:
        """Whether its engines are made of the ONNX model that `edgeprune.backends.onnxruntime.exporting.export` writes."""
        return True

    @property
    def precision(self) -> Precision:
        """Of its engines; see `for_precision`."""
        return "fp32"

    def for_timing(self) -> Backend:
        """The backend whose engines have the kernels of its own, and numbers that need not mean anything: int8 without data."""
        return self

    def for_deployment(self) -> Backend:
        """The backend whose engines are as quick as it knows how to make them, where those that are timed for a latency table
        are not: code that was tuned for some widths says nothing of others.
        """
        return self

    def for_precision(self, precision: Precision) -> Backend:
        """The backend whose engines have a precision.

        Raises:
            ConfigError: It cannot compile for that precision.
        """
        if precision not in self.precisions:
            raise ConfigError(
                f"the precision of {self.name} must be one of {', '.join(self.precisions)}, found {precision!r}.",
                hint=f"--precision {self.precisions[0]}, or another --backend",
            )
        return self

    def calibrated(self, cases: Sequence[Case], *, needed_db: float, told: Told | None = None) -> Backend:
        """The backend whose int8 engines take the ranges of their numbers from calibration data.

        Args:
            cases: Runs of the module: an array per positional input, at the deployment batch.
            needed_db: Signal-to-noise ratio that the engine's outputs must reach against float, decibel; the layers that
                make most of the noise stay in float where it would not.
            told: Told what `export` does.

        Raises:
            ConfigError: Its engines need no calibration.
        """
        raise ConfigError(f"only int8 engines take calibration data, {self.name} makes none.")

    def quantization(self, engine: Path) -> dict[str, Any] | None:
        """What an int8 engine says of its layers, for the manifest: ``layers``, ``kept`` (in float), ``snr_db``; else None."""
        return None

    def session(self, engine: Path, threads: int = 1) -> Session | None:
        """Runs an engine on this host, or the model that it was built from, for metrics; None where there is no such way."""
        return None

    def built_on(self, board: Board) -> Backend:
        """The backend that uses an open board to build, where engines can only be built there or candidates are timed there; else
        it is the backend itself.
        """
        return self

    def needs(self, engine: Path) -> dict[str, Any]:
        """What one engine needs of a board, for the ``requires`` block of an artifact: e.g. ``architecture``, ``isa``."""
        return {}

    def runs_here(self, engine: Path) -> bool:
        """Whether this host can execute an engine; where it cannot, its numbers are only checked on the board."""
        return True

    @abstractmethod
    def export(
        self, module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], path: Path
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Write the engine file of a module in eval form, checked, at the batch size of the example inputs.

        Returns:
            Inputs and outputs, as the engine names them.

        Raises:
            ExportError: The module cannot be exported; the message names the operation.
        """

    def export_source(
        self, module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], path: Path
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Write the file that `operators` reads: the engine, or what it is built from where only a board can build it.

        Takes, returns and raises what `export` does.
        """
        return self.export(module, example_inputs, path)

    def engine_of(self, source: Path, path: Path) -> Path:
        """The engine of a file that `export_source` wrote: that file, or one at `path` that is built from it."""
        return source

    @abstractmethod
    def operators(self, engine: Path) -> OperatorGraph:
        """The runtime's graph of a dense engine, or of what it is built from, before layouts are chosen."""

    @abstractmethod
    def infer_shapes(
        self, operator: Operator, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]] | None:
        """Shapes of an operator's tensors from those of its other tensors, at widths where only the latter are known.

        Args:
            operator: One of `graph`.
            graph: From `operators`.
            shapes: Tensor name to shape of the candidate, as far as they are known.

        Returns:
            None where they do not follow.
        """

    def tiled(
        self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]], layouts: Mapping[str, TileLayout]
    ) -> tuple[OperatorGraph, dict[str, tuple[int, ...]]]:
        """The graph of a model some linear layers of which are computed from tiles, and the shapes of its tensors.

        Args:
            graph: From `operators`.
            shapes: Tensor name to shape of the candidate.
            layouts: Node of the traced program that calls a layer to how the layer is computed.

        Raises:
            UnsupportedKernelError: The runtime computes such a layer in a way that is not known, or no such layer.
        """
        raise UnsupportedKernelError(
            f"the kernels of layers with tiles must be known to be priced, those of {self.name} are not.",
            hint="price it with onnxruntime",
        )

    def views(self) -> frozenset[str]:
        """Operations whose output shares the memory of their first input."""
        return frozenset()

    def in_place(self) -> frozenset[str]:
        """Operations that write over an input of their output's shape, where nothing reads it later."""
        return frozenset()

    @abstractmethod
    def layout_rule(
        self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]], architecture: str, isa: Sequence[str]
    ) -> list[Kernel]:
        """Kernels that the runtime executes when the tensors of `graph` have other shapes; no compilation.

        Args:
            graph: From `operators`.
            shapes: Tensor name to shape of the candidate.
            architecture: The board's, as in `Fingerprint.architecture`.
            isa: The board's instruction set flags; vector width decides layouts.
        """

    @abstractmethod
    def parse_engine(self, engine: Path) -> list[Kernel]:
        """Kernels that the runtime on this host really executes for an engine file, in order."""

    def labels(self, engine: Path) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """What the runtime's own names of kernels, as a trace has them, stand for.

        Returns:
            Operation by name of a kernel, where the runtime does not tell it itself; and module path by the beginning of a
            kernel's name, of which the longest counts.
        """
        return {}, {}

    @abstractmethod
    def kernel_engine(self, kernel: Kernel) -> bytes:
        """A tiny engine file that runs just this kernel, as the runtime itself would, for measuring it.

        A board may still refuse it; the profiler then leaves the kernel out and says so.
        """

    @abstractmethod
    def network_engine(self, graph: OperatorGraph, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
        """An engine of the same network with other widths and meaningless weights, for timing only."""

    def layer_kernels(
        self,
        engine: bytes,
        graph: OperatorGraph,
        shapes: Mapping[str, tuple[int, ...]],
        layers: Sequence[tuple[str, float]],
    ) -> list[tuple[Kernel, float]]:
        """What kernels took in a run of a network that was timed layer by layer; only with `layer_times`.

        Args:
            engine: From `network_engine`, of this very object.
            graph: As it was given there.
            shapes: As they were given there.
            layers: Name and mean time of each layer, milliseconds, in the order of the run.

        Returns:
            Kernels of `layout_rule` with their times, milliseconds. A kernel that the runtime computes together with others is
            not among them.
        """
        return []
