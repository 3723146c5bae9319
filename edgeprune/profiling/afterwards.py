"""What a profiling run measures of whole networks after all timing: in thermal equilibrium, one by one, their energy.

What was found is in the journal of the run, and is not measured again. A board whose link is lost meanwhile is waited for; what
was on its way then begins anew, since a board that was away has cooled, and its sensors were not read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgeprune.boards.board import Board
from edgeprune.errors import ConnectError, ShortWindowError
from edgeprune.profiling.energy import SETTLE_S, measure_energy, needed_s
from edgeprune.profiling.energy_windows import EnergyMeasurement
from edgeprune.profiling.journal import Journal
from edgeprune.profiling.measuring import Progress
from edgeprune.profiling.percentiles import ROUNDS
from edgeprune.profiling.percentiles import percentiles as timed_singly
from edgeprune.profiling.reconnecting import Reconnector
from edgeprune.profiling.selecting import Selection
from edgeprune.profiling.setting import Setting
from edgeprune.profiling.sustaining import sustained as heat

if TYPE_CHECKING:
    from edgeprune.boards.power import BoardPower

Found = TypeVar("Found")
Told = Callable[[str], None] | None

PART_S = 60.0
"""Networks that take about so long together, seconds, go into the journal together: no more is done anew."""


def heated(
    board: Board, setting: Setting, selection: Selection, book: Journal, tell: Progress, told: Told
) -> dict[str, Any]:
    """Networks timed on a cool and on a hot board; once, however often the run is interrupted after it."""
    for record in book.records:
        if record["kind"] == "sustained":
            return dict(record["found"])
    engines = network_engines(setting, selection)
    heater = next(iter(engines))
    work = partial(heat, board, engines, heater, runtime=setting.runtime, threads=setting.threads, progress=tell)
    found = _persevering(Reconnector(board, setting.wait_s), 0, tell, told, work)
    book.append({"kind": "sustained", "found": found})
    return found


def percentiles(
    board: Board, setting: Setting, selection: Selection, book: Journal, tell: Progress, told: Told
) -> dict[str, dict[str, Any]]:
    """Percentiles of single inferences of the measured networks; those that an interrupted run has taken are not taken again."""
    engines = network_engines(setting, selection)
    found: dict[str, dict[str, Any]] = {}
    for record in book.records:
        if record["kind"] == "percentiles":
            found |= {name: one for name, one in record["found"].items() if name in engines}
    left = [name for name in engines if name not in found]
    each_s = ROUNDS * setting.start_s
    # Where nothing has to start, all of them take less time than what is worth keeping.
    size = max(1, int(PART_S / each_s)) if each_s else max(1, len(left))
    parts = [left[start : start + size] for start in range(0, len(left), size)]
    reconnector = Reconnector(board, setting.wait_s)
    for number, part in enumerate(parts):
        before = sum(map(len, parts[:number]))
        said = _continued(tell, ROUNDS * before, ROUNDS * len(left), each_s * (len(left) - before - len(part)))
        chosen = {name: engines[name] for name in part}
        work = partial(timed_singly, board, chosen, runtime=setting.runtime, threads=setting.threads, progress=said)
        measured = _persevering(reconnector, len(found), tell, told, work)
        book.append({"kind": "percentiles", "found": measured})
        found |= measured
    return found


def energies(
    board: Board,
    setting: Setting,
    selection: Selection,
    power: BoardPower,
    how: Mapping[str, Any],
    book: Journal,
    tell: Progress,
    told: Told,
) -> dict[str, EnergyMeasurement]:
    """Energy per inference of the measured networks, by replay; those that an interrupted run has replayed are not again.

    Args:
        board: Where.
        setting: Of the run.
        selection: What it measures.
        power: What can be read.
        how: JSON-ready arguments of `measure_energy` that say what of it is meant: ``meter``, ``host_meter``, ``rails``.
        book: The journal of the run.
        tell: Progress.
        told: Told that the link was lost and came back.
    """
    engines = network_engines(setting, selection)
    # Another meter, or other rails, would be the energy of something else.
    asked = dict(how)
    found: dict[str, EnergyMeasurement] = {}
    for record in book.records:
        if record["kind"] == "energy" and record["asked"] == asked:
            kept = {name: one for name, one in record["found"].items() if name in engines}
            found |= {name: EnergyMeasurement.from_record(one) for name, one in kept.items()}
    left = sorted(set(engines) - set(found))
    order = random.Random(setting.seed).sample(left, len(left))
    each_s = 2 * (needed_s(power.scope(how["rails"])) + SETTLE_S + setting.start_s)
    size = max(1, int(PART_S / each_s))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    reconnector = Reconnector(board, setting.wait_s)
    for number, part in enumerate(parts):
        # Each network has a window and an idle one after it, each part one more before.
        before, whole = sum(map(len, parts[:number])), 2 * len(order) + len(parts)
        rest_s = each_s * (len(order) - before - len(part))
        said = _continued(tell, 2 * before + number, whole, rest_s)
        work = partial(_replayed, board, setting, {name: engines[name] for name in part}, power, asked, progress=said)
        measured = _persevering(reconnector, len(found), tell, told, work)
        book.append({"kind": "energy", "asked": asked, "found": {name: one.record() for name, one in measured.items()}})
        found |= measured
    return found


def network_engines(setting: Setting, selection: Selection) -> dict[str, bytes | Path]:
    """Engines of the measured networks by the names that the table has for them, that of the first dense one first."""
    engines: dict[str, bytes | Path] = {}
    for name, (place, candidate) in selection.candidates(setting.subjects).items():
        subject = setting.subjects[place]
        held = subject.dense_in(setting.table) if name == subject.network(0) else None
        engines[name if held is None else held.name] = subject.engine(candidate)
    return engines


def _replayed(
    board: Board,
    setting: Setting,
    engines: Mapping[str, bytes | Path],
    power: BoardPower,
    how: Mapping[str, Any],
    *,
    progress: Progress,
) -> dict[str, EnergyMeasurement]:
    try:
        return measure_energy(
            board,
            engines,
            runtime=setting.runtime,
            threads=setting.threads,
            rounds=1,
            seed=setting.seed,
            power=power,
            start_s=setting.start_s,
            progress=progress,
            **how,
        )
    except ShortWindowError as error:
        hint = "the same command without --energy, which finds every timing in its journal"
        raise ShortWindowError(error.message, hint=hint) from error


def _persevering(
    reconnector: Reconnector, measured: int, tell: Progress, told: Told, work: Callable[[], Found]
) -> Found:
    """What `work` finds; where the link is lost meanwhile, it is done anew once the board is back.

    Raises:
        RemoteError: The board did not come back in time.
    """
    while True:
        try:
            return work()
        except ConnectError as lost:
            gone_s = reconnector.wait(
                lost,
                measured,
                lambda left_s: tell(0, 0, left_s, f"the link is lost, waiting for the board for up to {left_s:.0f} s"),
            )
        if told is not None:
            name = reconnector.board.name
            told(
                f"the link to board {name} was lost, and came back after {gone_s:.0f} s; what was on its way begins anew"
            )


def _continued(tell: Progress, before: int, whole: int, rest_s: float) -> Progress:
    """Progress of one part as that of all of them."""

    def said(done: int, total: int, left_s: float, message: str) -> None:
        tell(before + done, whole, left_s + rest_s, message)

    return said
