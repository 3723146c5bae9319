"""What a profiling run measures of whole networks after all timing: in thermal equilibrium, one by one, their energy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.boards.board import Board
from edgeprune.errors import ShortWindowError
from edgeprune.profiling.energy import measure_energy
from edgeprune.profiling.energy_windows import EnergyMeasurement
from edgeprune.profiling.journal import Journal
from edgeprune.profiling.measuring import Progress
from edgeprune.profiling.percentiles import percentiles as timed_singly
from edgeprune.profiling.selecting import Selection
from edgeprune.profiling.setting import Setting
from edgeprune.profiling.sustaining import sustained as heat

if TYPE_CHECKING:
    from edgeprune.boards.power import BoardPower


def heated(board: Board, setting: Setting, selection: Selection, book: Journal, tell: Progress) -> dict[str, Any]:
    """Networks timed on a cool and on a hot board; once, however often the run is interrupted after it."""
    for record in book.records:
        if record["kind"] == "sustained":
            return dict(record["found"])
    engines = network_engines(setting, selection)
    found = heat(board, engines, next(iter(engines)), runtime=setting.runtime, threads=setting.threads, progress=tell)
    book.append({"kind": "sustained", "found": found})
    return found


def percentiles(board: Board, setting: Setting, selection: Selection, tell: Progress) -> dict[str, dict[str, Any]]:
    """Percentiles of single inferences of the measured networks."""
    engines = network_engines(setting, selection)
    return timed_singly(board, engines, runtime=setting.runtime, threads=setting.threads, progress=tell)


def energies(
    board: Board,
    setting: Setting,
    selection: Selection,
    power: BoardPower,
    meter: str | None,
    rails: Sequence[str] | None,
    tell: Progress,
) -> dict[str, EnergyMeasurement]:
    """Energy per inference of the measured networks, by replay."""
    try:
        return measure_energy(
            board,
            network_engines(setting, selection),
            runtime=setting.runtime,
            threads=setting.threads,
            rounds=1,
            seed=setting.seed,
            rails=rails,
            power=power,
            meter=meter,
            progress=tell,
        )
    except ShortWindowError as error:
        hint = "the same command without --energy, which finds every timing in its journal"
        raise ShortWindowError(error.message, hint=hint) from error


def network_engines(setting: Setting, selection: Selection) -> dict[str, bytes | Path]:
    """Engines of the measured networks by the names that the table has for them, that of the first dense one first."""
    engines: dict[str, bytes | Path] = {}
    for name, (place, candidate) in selection.candidates(setting.subjects).items():
        subject = setting.subjects[place]
        held = subject.dense_in(setting.table) if name == subject.network(0) else None
        engines[name if held is None else held.name] = subject.engine(candidate)
    return engines
