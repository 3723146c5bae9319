"""`profile`: measure on a board the kernels that models and their pruned versions run, and some of these as whole networks.

Kernels and networks share the same rounds, with the dense network as sentinel, so that the calibration from summed kernels
to networks is not fitted to a change of the machine. What is measured is decided once and written beside the table before
the first measurement; a run that was killed goes on with the same selection. A table that is extended stays whole until the
new one takes its place.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends import registry as backends
from edgeprune.boards.board import Board
from edgeprune.boards.reconnecting import WAIT_S
from edgeprune.errors import LatencyError
from edgeprune.latency.table import LatencyTable
from edgeprune.profiling import afterwards, extending, layered, space
from edgeprune.profiling.assembling import Part, Profiled, with_clocks
from edgeprune.profiling.core_share import core_share
from edgeprune.profiling.energy import power_of, with_energies
from edgeprune.profiling.journal import Journal
from edgeprune.profiling.journal_place import journals
from edgeprune.profiling.measuring import Progress
from edgeprune.profiling.percentiles import with_percentiles
from edgeprune.profiling.quick_look import accepted, look
from edgeprune.profiling.selecting import (
    Preview,
    Selection,
    guessed_dense_ms,
    preview_of,
    select,
)
from edgeprune.profiling.setting import Setting, checked, set_up, with_origins
from edgeprune.profiling.staging import assembled, beside, kernel_engines, measure_stage, refined, stages_of
from edgeprune.profiling.subjects import DENSE
from edgeprune.profiling.sustaining import with_sustained
from edgeprune.profiling.uploads import spilled
from edgeprune.spec import Precision

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.lowering.kernel_graph import KernelGraph

__all__ = ["DENSE", "Preview", "Selection", "preview", "profile"]

_WATCHED_MS = 300.0
"""For about so long a core is watched: some time slices of other programs, some periods of a quota."""

logger = logging.getLogger("edgeprune.profiling")


def profile(
    model: nn.Module | Mapping[str, nn.Module],
    example_inputs: Any,
    board: Board | str = "local",
    backend: str = "onnxruntime",
    minutes: float = 2.0,
    *,
    precision: Precision = "fp32",
    table: LatencyTable | Path | str | None = None,
    threads: int = 1,
    seed: int = 0,
    sustained: bool = False,
    lock_clocks: bool = False,
    power_mode: str | None = None,
    out: Path | str | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
    graph: ChannelGraph | Mapping[str, ChannelGraph] | None = None,
    kernel_graph: KernelGraph | Mapping[str, KernelGraph] | None = None,
    energy: bool = False,
    meter: str | None = None,
    host_meter: str | None = None,
    rails: Sequence[str] | None = None,
    percentiles: bool = False,
    tiles: Sequence[tuple[int, int]] = (),
    origins: Sequence[Sequence[str]] | None = None,
    wait_s: float = WAIT_S,
) -> LatencyTable:
    """Measure what a latency predictor for pruning `model` on `board` needs.

    Args:
        model: The dense model, or several by name; only their structure is used.
        example_inputs: Tensor, tuple or dict; fixes shapes and the deployment batch. Of several models a mapping from the
            same names.
        board: An open board, or what `Board.open` takes.
        backend: Which runtime executes the kernels.
        minutes: How long it may take; more kernels are measured in more time. Tracing, lowering and building engines are
            counted up to half of it: what is left, at least the other half, is the board's.
        precision: Of the engines that are measured. In int8 every layer is quantized, in the form that suits the board's
            processor; ranges are those of the example inputs, since latency does not depend on them.
        table: A table to extend, or its path: only what it lacks, or predicts with a wide interval, is measured. Its rows
            stay as they are; new times are related to them by kernels that are measured again.
        threads: Threads inside one operation.
        seed: Of the drawn candidates and of the order of measuring.
        sustained: Afterwards let the board cool, heat it to thermal equilibrium, and keep the latencies of the measured
            networks in both states in the header; at most about twelve minutes more, see `sustaining.sustained`.
        lock_clocks: Hold the clocks still meanwhile, in the ways that the device type allows; they are put back in any
            case, see `Board.lock_clocks`.
        power_mode: Name or number of a Jetson's power mode to be in meanwhile; the one before comes back. The table is one of
            this mode, and is refused in another.
        out: Where the table is saved; may be the path of `table`, which is then replaced in one step. A journal lies beside
            it until then, and a run with the same arguments that finds one goes on from it. Without
            it the journal lies in the state folder (`EDGEPRUNE_STATE`), for a day.
        progress: Told (items done, items in all, seconds left, what happens).
        told: Told what a table knows, how the board compares with it, that it goes on from an interrupted run, and what
            became of the board meanwhile (throttling, another power mode, a restart).
        graph: The traced model or models, where the caller has them.
        kernel_graph: The lowered model or models, where the caller has them; lowered for this board.
        energy: Measure the energy per inference of the whole networks too (`measure_energy`), after all timing; it takes
            about 15 s per network beside `minutes`, more where the sensor is slow.
        meter: With `energy`: command on the board that prints an external meter's watts.
        host_meter: With `energy`: command on this machine that does, instead.
        rails: With `energy`: the rails that are summed, where the device type does not say which are the board's.
        percentiles: Time single inferences of the measured networks too, 500 of each, for `LatencyTable.chosen`; it takes
            about 500 times their latencies beside `minutes`, and begins anew when it is
            interrupted meanwhile, but for networks of TensorRT that are done.
        tiles: Sizes of tiles (outputs, inputs) of linear layers, for `edgeprune.prune_tiles`: the kernels that the models run
            without some of them are measured too, and a few such networks whole.
        origins: Of each model the words that name it and its inputs on the command line; kept in the header, so that `fit` can
            say what to run next.
        wait_s: How long a board whose link is lost is waited for, seconds; then the run goes on.

    Raises:
        ConfigError: `minutes` is not positive, models and inputs have different names, the backend has no such precision or
            cannot measure a sustained latency, the device type does not say how clocks are locked, or a model
            has no linear layer that is larger than one of the tiles.
        UnsupportedKernelError: The kernels that the backend runs for tiles are not known.
        CompileError: In int8: no layer of a model has weights.
        PowerUnavailableError: `energy` is asked for, and the board's power cannot be read.
        ShortWindowError: The board's sensor is too slow for `energy`; everything that was timed is in the journal.
        CommandError: The board does not let its user lock clocks, and nothing was measured.
        TableMismatchError: `table` is of another device, runtime version, thread count or precision, or the board is now much
            quicker or slower than it was.
        UnstableMeasurementError: Kernels of `table` changed, and not all alike.
        BackendUnavailableError: The board lacks the runtime.
        BoardBusyError: Another run holds the board.
        RemoteError: The board was lost, and did not come back in time; run it again, and it goes on.
    """
    begun = time.monotonic()
    tell = progress or _silent
    base = checked(minutes, table)
    if sustained:
        layered.refuse_heating(backends.get(backend))
    with Board.open(board) as target, target.hold("profile"), ExitStack() as stack:
        clocks: dict[str, Any] = {}
        held = stack.enter_context(ExitStack())
        if power_mode is not None:
            # Before the board is asked what it is: that depends on its mode.
            tell(0, 0, 60 * minutes, f"choosing power mode {power_mode}")
            clocks = held.enter_context(target.lock_clocks(clocks=lock_clocks, power_mode=power_mode))
        setting = set_up(
            stack,
            model,
            example_inputs,
            target,
            backend,
            minutes,
            base,
            threads,
            seed,
            tell,
            graph,
            kernel_graph,
            precision=precision,
            tiles=tiles,
        )
        setting = replace(setting, wait_s=wait_s)
        how = {"meter": meter, "host_meter": host_meter, "rails": None if rails is None else list(rails)}
        power = power_of(target, meter=meter, host_meter=host_meter) if energy else None
        if power is not None:
            power.scope(rails)  # tells now, not after all timing, that the power cannot be read
        asked_for = {**setting.request, "locked": lock_clocks}
        path = stack.enter_context(journals(None if out is None else Path(out), target, asked_for))
        if lock_clocks and not clocks:
            tell(0, 0, setting.seconds, "locking the clocks")
            clocks = held.enter_context(target.lock_clocks())
        with Journal(path and beside(path, "selection"), asked_for) as chosen:
            if chosen.records:
                selection = Selection.from_record(chosen.records[0])
            else:
                selection = _selected(target, setting, begun, tell)
                chosen.append(selection.record())
            if setting.table is not None and told is not None:
                told(str(preview_of(selection, setting.subjects, setting.table)))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-networks-")))
            found = _measured(target, setting, selection, chosen, path, folder, tell, told)
            if told is not None and found is not setting.table:
                for sentence in (found.header if base is None else found.header["runs"][-1])["disturbances"]:
                    told(sentence)
            common = (target, setting, selection)
            heated = afterwards.heated(*common, chosen, tell, told) if sustained else None
            tails = afterwards.percentiles(*common, chosen, tell, told) if percentiles else None
            energies = None
            if power is not None:
                energies = afterwards.energies(*common, power, how, chosen, tell, told)
            held.close()
            # Only now is it known whether the clocks are what they were.
            if found is not setting.table:
                found = with_clocks(found, {"locked": lock_clocks, **_without_process(clocks)}, setting.table)
                found = found if origins is None else with_origins(found, setting, origins)
            if heated is not None:
                found = with_sustained(found, heated)
                if told is not None:
                    told(heated["statement"])
            if tails is not None:
                found = with_percentiles(found, tails)
            if energies is not None:
                found = with_energies(found, energies)
            if clocks and told is not None:
                told(_on_clocks(clocks))
            if out is not None:
                found.save(out)
            if path is not None:
                for number in range(len(stages_of(chosen)) + 1):
                    beside(path, f"journal-{number}" if number else "journal").unlink(missing_ok=True)
            chosen.discard()
    return found


def preview(
    model: nn.Module | Mapping[str, nn.Module],
    example_inputs: Any,
    board: Board | str = "local",
    backend: str = "onnxruntime",
    minutes: float = 2.0,
    *,
    precision: Precision = "fp32",
    table: LatencyTable | Path | str | None = None,
    threads: int = 1,
    seed: int = 0,
    tiles: Sequence[tuple[int, int]] = (),
    progress: Progress | None = None,
) -> Preview:
    """What `profile` with the same arguments would measure. The board is asked what it is, and nothing is timed.

    With a table the answer is what `profile` then does. Without one it is an estimate: how quick the board is decides how
    many kernels fit into the time.

    Raises:
        ConfigError: As `profile`.
        TableMismatchError: `table` is of another device, runtime version, thread count or precision.
        BackendUnavailableError: The board lacks the runtime.
        RemoteError: The board cannot be reached.
    """
    tell = progress or _silent
    base = checked(minutes, table)
    with Board.open(board) as target, ExitStack() as stack:
        setting = set_up(
            *(stack, model, example_inputs, target, backend, minutes, base, threads, seed, tell, None, None),
            precision=precision,
            tiles=tiles,
        )
        tell(0, 0, 0.0, "choosing kernels and networks")
        if setting.layer_times is not None:
            return preview_of(layered.usual(setting), setting.subjects, setting.table)
        dense_ms = guessed_dense_ms(setting.subjects, setting.predictor)
        selection = select(setting.subjects, dense_ms, 60 * minutes, seed=seed, predictor=setting.predictor)
        return preview_of(selection, setting.subjects, setting.table)


def _selected(board: Board, setting: Setting, begun: float, tell: Progress) -> Selection:
    """Choose what fits into the time, from one quick measurement of the dense networks or from what the table predicts."""
    seconds, seed = setting.seconds, setting.seed
    if setting.layer_times is not None:
        return layered.selected(board, setting, begun, tell)
    if setting.predictor is not None:
        tell(0, 0, seconds, "choosing kernels and networks")
        # The same as `preview` says, whatever the time that lowering took.
        dense_ms = guessed_dense_ms(setting.subjects, setting.predictor)
        return select(setting.subjects, dense_ms, seconds, seed=seed, predictor=setting.predictor)
    tell(0, 0, seconds, "timing the dense network")
    engines = {
        subject.network(0): subject.kernel_graph.network_engine(space.group_sizes(subject.kernel_graph))
        for subject in setting.subjects
    }
    longest_ms = max(5.0, *guessed_dense_ms(setting.subjects, None))
    quick = look(board, setting, engines, samples=max(3, min(40, math.ceil(_WATCHED_MS / longest_ms))))
    tell(0, 0, seconds, "choosing kernels and networks")
    # Half of a short time may already be gone: what was asked for still gets the other half.
    left_s = max(0.5 * seconds, seconds - (time.monotonic() - begun) - 0.05 * seconds)
    dense_ms = [quick.measurements[name].median_ms for name in engines]
    # What fits is reckoned for a core of one's own; of a slower one, or one that is shared, there is less in the same time.
    share = core_share(quick, setting.threads)
    return replace(select(setting.subjects, dense_ms, share * left_s, seed=seed), budget_s=left_s)


def _measured(
    board: Board,
    setting: Setting,
    selection: Selection,
    book: Journal,
    path: Path | None,
    folder: Path,
    tell: Progress,
    told: Callable[[str], None] | None,
) -> LatencyTable:
    base, subjects = setting.table, setting.subjects
    if base is not None and not preview_of(selection, subjects, base).to_measure:
        return base
    networks = selection.candidates(subjects)
    engines: dict[str, bytes | Path] = {}
    for number, (name, (place, candidate)) in enumerate(networks.items(), 1):
        tell(0, 0, selection.budget_s, f"building engine {number} of {len(networks)}")
        engines[name] = spilled(subjects[place].engine(candidate), folder / f"network-{number}")
    kernels, unsupported = kernel_engines(selection.kernels, subjects[0].kernel_graph, engines)
    anchors, _ = kernel_engines(selection.anchors, subjects[0].kernel_graph, engines)
    if base is not None and (path is None or not beside(path, "journal").exists()):
        # A board that is not what it was is refused before minutes are spent on it.
        tell(0, 0, selection.budget_s, "comparing the board with the table")
        sentinel = subjects[0].network(0)
        dense = {sentinel: networks[sentinel]}

        def compared() -> None:
            check = look(board, setting, {name: engines[name] for name in (sentinel, *anchors)}, list(anchors))
            extending.link(base, layered.with_layers(Part(check, {}, {}, anchors), setting, dense, engines).anchored())

        accepted(compared, lambda message: tell(0, 0, selection.budget_s, message))
    later_s = selection.refine_s
    run = measure_stage(
        board,
        setting,
        selection,
        engines,
        [*kernels, *anchors],
        path and beside(path, "journal"),
        selection.budget_s - later_s,
        lambda done, total, left_s, message: tell(done, total, left_s + later_s, message),
        told,
    )
    part = layered.with_layers(Part(run, kernels, unsupported, anchors), setting, networks, engines)
    profiled = Profiled(subjects, networks, [part], setting.fingerprint, setting.request)
    link = None if base is None else _linked(base, profiled.parts[0], path)
    if link is not None and told is not None:
        told(link.sentence())
    profiled = refined(board, setting, selection, profiled, link, book, path, tell, told)
    return assembled(base, profiled, link)


def _without_process(clocks: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in clocks.items() if name != "pid"}


def _on_clocks(clocks: Mapping[str, Any]) -> str:
    ways = " and ".join(clocks["ways"])
    if clocks.get("restored"):
        return f"clocks were locked by {ways}, and are restored"
    return f"clocks were locked by {ways}; the board restores them by itself, and has not said yet that it did"


def _linked(base: LatencyTable, part: Part, path: Path | None) -> extending.Link:
    """How the run compares with the table; where it does not, its journal is put aside, so that the next one begins anew."""
    try:
        return extending.link(base, part.anchored())
    except LatencyError:
        if path is not None:
            journal = beside(path, "journal")
            if journal.exists():
                journal.replace(beside(path, "journal.refused"))
        raise


def _silent(done: int, total: int, left_s: float, message: str) -> None:
    """No progress was asked for."""
