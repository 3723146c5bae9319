"""What one profiling run is about: its models, its board, its settings, and the table that it extends."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends import registry
from edgeprune.boards.board import Board
from edgeprune.boards.cores import quota_note, require_cores
from edgeprune.boards.installing import for_board
from edgeprune.errors import (
    BackendUnavailableError,
    ConfigError,
    EmulatedProcessorError,
    TableMismatchError,
    UnsupportedKernelError,
)
from edgeprune.latency.chosen import Chosen
from edgeprune.latency.table import LatencyTable
from edgeprune.profiling import extending
from edgeprune.profiling.measuring import Progress
from edgeprune.profiling.subjects import Subject, lowered_subjects
from edgeprune.profiling.tiled_draws import Tile
from edgeprune.spec import Fingerprint, Kernel, Precision

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.backends._base import LayerTimes
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph

_log = logging.getLogger("edgeprune.profiling.setting")


@dataclass(frozen=True)
class Setting:
    """What one run is about.

    Attributes:
        subjects: Its models.
        fingerprint: Of the board.
        request: What two runs must have in common for one to go on with what the other measured.
        table: The table that is extended.
        predictor: Fitted to that table.
        wait_s: How long a board whose link is lost is waited for, seconds.
    """

    subjects: Sequence[Subject]
    fingerprint: Fingerprint
    request: dict[str, Any]
    table: LatencyTable | None
    predictor: Predictor | None
    wait_s: float = 0.0

    @property
    def runtime(self) -> str:
        return self.subjects[0].kernel_graph.backend.name

    @property
    def layer_times(self) -> LayerTimes | None:
        """How kernels are timed where that is done as layers of networks; see `Backend.layer_times`."""
        return self.subjects[0].kernel_graph.backend.layer_times

    @property
    def start_s(self) -> float:
        """What it takes about until an engine runs, seconds: next to nothing but where it is loaded by a process of its own."""
        return 0.0 if self.layer_times is None else self.layer_times.timing_s

    @property
    def seconds(self) -> float:
        return float(60 * self.request["settings"][0])

    @property
    def precision(self) -> Precision:
        return self.subjects[0].kernel_graph.backend.precision

    @property
    def threads(self) -> int:
        return int(self.request["settings"][1])

    @property
    def seed(self) -> int:
        return int(self.request["settings"][2])


def checked(minutes: float, table: LatencyTable | Path | str | None) -> LatencyTable | None:
    """The table that is to be extended; whatever can be refused without a board is refused here.

    Raises:
        ConfigError: `minutes` is not positive.
        TableFileMissingError: There is no such table.
        TableFormatError: It cannot be read.
        TableMismatchError: It does not hold medians, which is what would be added to it.
    """
    if not minutes > 0:
        raise ConfigError(f"minutes must be greater than 0, found {minutes}.")
    base = LatencyTable.load(table) if isinstance(table, str | Path) else table
    if base is not None and not (chosen := Chosen.of(base.header)).plain:
        raise TableMismatchError(
            f"a table that is extended must hold medians, found one of {chosen}.",
            hint="the table that edgeprune profile wrote",
        )
    return base


def set_up(
    stack: ExitStack,
    model: nn.Module | Mapping[str, nn.Module],
    example_inputs: Any,
    board: Board,
    backend: str,
    minutes: float,
    base: LatencyTable | None,
    threads: int,
    seed: int,
    tell: Progress,
    graph: ChannelGraph | Mapping[str, ChannelGraph] | None,
    kernel_graph: KernelGraph | Mapping[str, KernelGraph] | None,
    *,
    precision: Precision = "fp32",
    tiles: Sequence[Tile] = (),
) -> Setting:
    """Probe the board, trace and lower the models, and fit the table that is extended.

    Raises:
        ConfigError: Models and inputs have different names, the backend has no such precision, a kernel graph has another, a
            model has no linear layer larger than one of the tiles, or the board has no core for each thread.
        TableMismatchError: The table is of another device, runtime version, thread count or precision.
        UnsupportedKernelError: A model cannot be lowered, or not be timed in int8.
        BackendUnavailableError: The board lacks the runtime.
        EmulatedProcessorError: What is timed on the board means nothing.
        RemoteError: The board cannot be reached.
    """
    from edgeprune.latency.fitting import fit

    registry.get(backend).for_precision(precision)  # refused now, not after the board was probed
    tell(0, 0, 60 * minutes, f"probing {board.name}")
    fingerprint = board.probe()
    if fingerprint.facts.get("emulated"):
        raise EmulatedProcessorError(
            f"board {board.name} must have a real processor to be profiled, its {fingerprint.architecture} is emulated.",
            hint="profile a board of the device type that you deploy to",
        )
    _require_runtime(backend, fingerprint, board)
    require_cores(fingerprint, threads, board=board.name)
    held_up = quota_note(fingerprint, threads, board=board.name)
    if held_up is not None:
        _log.warning("%s", held_up)
    if base is not None:
        extending.require_same(base, fingerprint.identity(backend), backend, threads, precision)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-profile-")))
    tell(0, 0, 60 * minutes, "lowering the model")
    subjects = lowered_subjects(
        model,
        example_inputs,
        backend,
        board,
        fingerprint,
        folder,
        precision=precision,
        graph=graph,
        kernel_graph=kernel_graph,
        table=base,
        tiles=tiles,
    )
    # Layers that are timed one by one say themselves which kernels they are.
    if precision == "int8" and registry.get(backend).layer_times is None:
        for subject in subjects:
            require_timeable(subject, folder)
    request = {
        "identity": fingerprint.identity(backend),
        "board": board.name,
        "models": [[subject.kernel_graph.graph.signature, subject.shapes()] for subject in subjects],
        "settings": [minutes, threads, seed],
        "table": None if base is None else base.hash,
        **({} if precision == "fp32" else {"precision": precision}),
        **({"tiles": [list(tile) for tile in tiles]} if tiles else {}),
    }
    if base is not None:
        tell(0, 0, 60 * minutes, "fitting the table that is there")
    return Setting(subjects, fingerprint, request, base, None if base is None else fit(base, seed=seed))


def require_timeable(subject: Subject, folder: Path) -> None:
    """See that what is timed as a whole network runs the int8 kernels that the model does.

    Of a network for timing the runtime sees what it made of the model, and makes of that what it can once more.

    Args:
        subject: A model in int8.
        folder: For an engine.

    Raises:
        UnsupportedKernelError: It would run others; names their operations.
    """
    kernel_graph, engine = subject.kernel_graph, folder / "timed"
    whole = kernel_graph.graph.widths()
    engine.write_bytes(kernel_graph.network_engine(whole))
    wanted, found = (
        Counter(kernel.key for kernel in kernels if kernel.precision == "int8")
        for kernels in (kernel_graph.at(whole), kernel_graph.backend.parse_engine(engine))
    )
    if wanted != found:
        names = ", ".join(sorted({Kernel.from_key(key).op for key in (wanted - found) + (found - wanted)}))
        raise UnsupportedKernelError(
            f"a network for timing must run the int8 kernels of the model {subject.name}, found others of {names}.",
            hint="--precision fp32",
        )


def _require_runtime(backend: str, fingerprint: Fingerprint, board: Board) -> None:
    for requirement in registry.get(backend).requirements(fingerprint):
        if not requirement.met:
            raise BackendUnavailableError(
                f"board {board.name} must have {requirement.field} {requirement.needed}, found {requirement.found}.",
                hint=for_board(requirement.hint, board.name),
            )


def with_origins(table: LatencyTable, setting: Setting, origins: Sequence[Sequence[str]]) -> LatencyTable:
    """The table with the words by which a command line names the models of a run and their inputs, in the order of the models."""
    models = [json.dumps(identity) for identity in setting.request["models"]]
    said = {model: list(words) for model, words in zip(models, origins, strict=True)}
    # Two models may be alike; one that the table knew keeps the name that it had.
    named = {
        (subject.name, model): said_of
        for subject, model, said_of in zip(setting.subjects, models, origins, strict=True)
    }
    entries = []
    for entry in table.header["models"]:
        model = json.dumps([entry.get("signature"), entry.get("inputs")])
        words = named.get((entry["name"], model)) or said.get(model)
        entries.append(entry if words is None else {**entry, "origin": list(words)})
    return LatencyTable({**table.header, "models": entries}, table.rows)
