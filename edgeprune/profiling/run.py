"""`profile`: measure on a board the kernels that a model and its pruned versions run, and some of these as whole networks.

Kernels and networks share the same rounds, with the dense network as sentinel, so that the calibration from summed kernels
to networks is not fitted to a change of the machine. What is measured is decided once and written beside the table before
the first measurement; a run that was killed goes on with the same selection.
"""

from __future__ import annotations

import hashlib
import logging
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.boards.board import Board
from edgeprune.errors import BackendUnavailableError, ConfigError, ShortWindowError, UnsupportedKernelError
from edgeprune.latency.intervals import repeatability
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import kernel_row, network_key, network_row
from edgeprune.profiling import space
from edgeprune.profiling.energy import measure_energy
from edgeprune.profiling.energy_windows import EnergyMeasurement
from edgeprune.profiling.journal import Journal
from edgeprune.profiling.measuring import MeasuredRun, Progress, measure
from edgeprune.spec import Fingerprint, Kernel

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.lowering.kernel_graph import KernelGraph

logger = logging.getLogger("edgeprune.profiling")

DENSE = "dense"
"""Name of the dense network in a table."""

ROUNDS = 3
SAMPLES, SAMPLE_MS, WARMUP_MS = 5, 4.0, 10.0
# Share of the measuring time that the estimate may fill, and what loading one engine in one round costs.
_FILL, _LOAD_MS = 0.8, 6.0
_NETWORKS_MOST, _NETWORKS_LEAST, _NETWORKS_SHARE = 12, 4, 0.35
_SENTINEL_SHARE = 0.15


@dataclass(frozen=True)
class Selection:
    """What a profiling run measures.

    Attributes:
        kernels: Kernels that are measured by themselves.
        networks: Widths of the networks that are measured whole, the dense one first.
        every: Items between two sentinels.
        budget_s: Time for all rounds together, seconds.
    """

    kernels: tuple[Kernel, ...]
    networks: tuple[space.Widths, ...]
    every: int
    budget_s: float

    def record(self) -> dict[str, Any]:
        """As a journal's record."""
        return {
            "kind": "selection",
            "kernels": [kernel.key for kernel in self.kernels],
            "networks": list(self.networks),
            "every": self.every,
            "budget_s": self.budget_s,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Selection:
        """From a journal's record."""
        return cls(
            tuple(Kernel.from_key(key) for key in record["kernels"]),
            tuple(record["networks"]),
            record["every"],
            record["budget_s"],
        )


def profile(
    model: nn.Module,
    example_inputs: Any,
    board: Board | str = "local",
    backend: str = "onnxruntime",
    minutes: float = 2.0,
    *,
    threads: int = 1,
    seed: int = 0,
    out: Path | str | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
    graph: ChannelGraph | None = None,
    kernel_graph: KernelGraph | None = None,
    energy: bool = False,
    meter: str | None = None,
) -> LatencyTable:
    """Measure what a latency predictor for pruning `model` on `board` needs.

    Args:
        model: The dense model; only its structure is used.
        example_inputs: Tensor, tuple or dict; fixes shapes and the deployment batch.
        board: An open board, or what `Board.open` takes.
        backend: Which runtime executes the kernels.
        minutes: How long all of it may take; more kernels are measured in more time.
        threads: Threads inside one operation.
        seed: Of the drawn candidates and of the order of measuring.
        out: Where the table is saved. A journal lies beside it until then, and a run with the same arguments that finds
            one goes on from it.
        progress: Told (items done, items in all, seconds left, what happens).
        told: Told, once, that it goes on from an interrupted run.
        graph: The traced model, where the caller has it.
        kernel_graph: The lowered model, where the caller has it; must have been lowered for this board.
        energy: Measure the energy per inference of the whole networks too (`measure_energy`), after all timing; it takes
            about 15 s per network beside `minutes`, more where the sensor is slow, and begins anew when it is interrupted.
        meter: With `energy`: command on the board that prints an external meter's watts.

    Raises:
        ConfigError: `minutes` is not positive.
        PowerUnavailableError: `energy` is asked for, and the board's power cannot be read.
        ShortWindowError: The board's sensor is too slow for `energy`; everything that was timed is in the journal.
        BackendUnavailableError: The board lacks the runtime.
        BoardBusyError: Another run holds the board.
        RemoteError: The board was lost; run it again, and it goes on.
    """
    if not minutes > 0:
        raise ConfigError(f"minutes must be greater than 0, found {minutes}.")
    begun = time.monotonic()
    tell = progress or _silent
    with Board.open(board) as target, target.hold("profile"):
        tell(0, 0, 60 * minutes, f"probing {target.name}")
        fingerprint = target.probe()
        power = target.power(meter=meter) if energy else None
        if power is not None:
            power.scope()  # tells now, not after all timing, that the power cannot be read
        with tempfile.TemporaryDirectory(prefix="edgeprune-profile-") as folder:
            tell(0, 0, 60 * minutes, "lowering the model")
            lowered = kernel_graph or _lower(model, example_inputs, backend, fingerprint, graph, Path(folder))
            _require_runtime(lowered, fingerprint, target)
            request = {
                "identity": fingerprint.identity(lowered.backend.name),
                "board": target.name,
                "model": lowered.graph.signature,
                "inputs": [list(tensor.shape) for tensor in lowered.graph.example_inputs],
                "settings": [minutes, threads, seed],
            }
            path = None if out is None else Path(out)
            with Journal(path and _beside(path, "selection"), request) as chosen:
                if chosen.records:
                    selection = Selection.from_record(chosen.records[0])
                else:
                    selection = _select(target, lowered, threads, seed, begun, 60 * minutes, tell)
                    chosen.append(selection.record())
                measuring = None if power is None else partial(measure_energy, target, power=power, meter=meter)
                table = _measured(target, lowered, selection, fingerprint, request, path, tell, told, measuring)
                if path is not None:
                    table.save(path)
                    _beside(path, "journal").unlink(missing_ok=True)
                chosen.discard()
    return table


def _measured(
    board: Board,
    kernel_graph: KernelGraph,
    selection: Selection,
    fingerprint: Fingerprint,
    request: dict[str, Any],
    path: Path | None,
    tell: Progress,
    told: Callable[[str], None] | None,
    measuring: Callable[..., dict[str, EnergyMeasurement]] | None,
) -> LatencyTable:
    _, threads, seed = request["settings"]
    names = [DENSE if number == 0 else f"network-{number:02d}" for number in range(len(selection.networks))]
    networks = dict(zip(names, selection.networks, strict=True))
    tell(0, 0, selection.budget_s, "building engines")
    engines: dict[str, bytes | Path] = {name: kernel_graph.network_engine(widths) for name, widths in networks.items()}
    kernels: dict[str, Kernel] = {}
    unsupported: dict[str, str] = {}
    for kernel in selection.kernels:
        name = hashlib.sha256(kernel.key.encode()).hexdigest()[:16]
        try:
            engines[name] = kernel_graph.backend.kernel_engine(kernel)
            kernels[name] = kernel
        except UnsupportedKernelError as error:
            unsupported[kernel.key] = error.message
            logger.warning("%s", error.message)
    run = measure(
        board,
        engines,
        runtime=kernel_graph.backend.name,
        threads=threads,
        rounds=ROUNDS,
        samples=SAMPLES,
        sample_ms=SAMPLE_MS,
        warmup_ms=WARMUP_MS,
        sentinel=DENSE,
        every=selection.every,
        seed=seed,
        journal=path and _beside(path, "journal"),
        progress=tell,
        told=told,
        kernels=list(kernels),
        budget_s=selection.budget_s,
        identity=request["identity"],
    )
    unsupported |= {kernels[name].key: message for name, message in run.unusable.items()}
    rows = [kernel_row(kernels[name], run.measurements[name]) for name in kernels if name in run.measurements]
    rows += [
        network_row(name, kernel_graph.at(widths), run.measurements[name], widths) for name, widths in networks.items()
    ]
    header = {**_header(run, kernels, kernel_graph, fingerprint, request), "unsupported": unsupported}
    if measuring is not None:
        whole = {name: engines[name] for name in networks}
        runtime = kernel_graph.backend.name
        try:
            found = measuring(whole, runtime=runtime, threads=threads, rounds=1, seed=seed, progress=tell)
        except ShortWindowError as error:
            hint = "the same command without --energy, which finds every timing in its journal"
            raise ShortWindowError(error.message, hint=hint) from error
        keys = {row["key"]: network_key(row["kernels"]) for row in rows if row["kind"] == "network"}
        header["energy"] = {keys[name]: measurement.record() for name, measurement in found.items()}
    return LatencyTable.from_rows(header, rows)


def _header(
    run: MeasuredRun,
    kernels: dict[str, Kernel],
    kernel_graph: KernelGraph,
    fingerprint: Fingerprint,
    request: dict[str, Any],
) -> dict[str, Any]:
    dense = run.measurements[DENSE]
    flagged: dict[str, list[str]] = {}
    for name, flags in sorted(run.flags.items()):
        for flag in flags:
            flagged.setdefault(flag, []).append(kernels[name].key if name in kernels else name)
    minutes, threads, seed = request["settings"]
    repeats = repeatability(found for name, found in run.rounds.items() if name in kernels)
    return {
        "identity": request["identity"],
        "fingerprint": asdict(fingerprint),
        "board": request["board"],
        "runtime": kernel_graph.backend.name,
        "threads": threads,
        "precision": "fp32",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "edgeprune": _own_version(),
        "label": "measured",
        "model": {"signature": request["model"], "inputs": request["inputs"]},
        "reference": {"network": DENSE, "median_ms": dense.median_ms, "rounds_ms": list(dense.rounds_ms)},
        "repeatability": {"median_error": float(np.median(repeats)) if len(repeats) else None, "rounds": len(repeats)},
        "protocol": {
            "minutes": minutes,
            "seed": seed,
            "rounds": len(dense.rounds_ms),
            "samples": SAMPLES,
            "sample_ms": SAMPLE_MS,
            "warmup_ms": WARMUP_MS,
            "overhead_ms": run.overhead_ms,
        },
        "drift": {
            "largest": run.drift,
            "repeated_stretches": run.repeated_rounds,
            "drifted_rows": len(flagged.get("drifted", ())),
        },
        "conditions": dict(run.conditions),
        "flags": flagged,
    }


def _select(
    board: Board,
    kernel_graph: KernelGraph,
    threads: int,
    seed: int,
    begun: float,
    seconds: float,
    tell: Progress,
) -> Selection:
    """Choose what fits into the time, from one quick measurement of the dense network."""
    tell(0, 0, seconds, "timing the dense network")
    sizes = space.group_sizes(kernel_graph)
    quick = measure(
        board,
        {DENSE: kernel_graph.network_engine(sizes)},
        runtime=kernel_graph.backend.name,
        threads=threads,
        rounds=1,
        samples=3,
        max_repeats=0,
    )
    dense_ms = quick.measurements[DENSE].median_ms
    tell(0, 0, seconds, "choosing kernels and networks")
    # Half of a short time may already be gone: what was asked for still gets the other half.
    budget_s = max(0.5 * seconds, seconds - (time.monotonic() - begun) - 0.05 * seconds)
    round_ms = _FILL * 1e3 * budget_s / ROUNDS
    pace = dense_ms / float(space.price(kernel_graph.at(sizes), kernel_graph).sum())
    # The time of a long network falls with its widths; two thirds of the dense one is about the mean of `networks`.
    affordable = int(_NETWORKS_SHARE * round_ms / item_ms(dense_ms * 2 / 3))
    networks = space.networks(kernel_graph, min(_NETWORKS_MOST, max(_NETWORKS_LEAST, affordable)), seed=seed)
    left_ms = round_ms - len(networks) * item_ms(dense_ms * 2 / 3)
    most = max(8, int(left_ms / item_ms(0.0)))
    draws = max(40, min(300, most))
    kernels = space.sample(kernel_graph, most, seed=seed, draws=draws)
    costs_ms = [item_ms(pace * float(cost)) for cost in space.price(kernels, kernel_graph)]
    mean_ms = sum(costs_ms) / len(costs_ms)
    every = max(10, min(60, math.ceil(item_ms(dense_ms) / (_SENTINEL_SHARE * mean_ms))))
    count, spent_ms = 0, 0.0
    for cost_ms in costs_ms:
        spent_ms += cost_ms + item_ms(dense_ms) / every
        if spent_ms > left_ms and count >= 8:
            break
        count += 1
    logger.info("measuring %d of %d kernels and %d networks", count, len(kernels), len(networks))
    return Selection(tuple(kernels[:count]), tuple(networks), every, budget_s)


def item_ms(run_ms: float) -> float:
    """About how long one item takes in one round, milliseconds, when one run takes `run_ms`."""
    return 1.5 * max(WARMUP_MS, 2 * run_ms) + SAMPLES * max(SAMPLE_MS, run_ms) + _LOAD_MS


def _lower(
    model: nn.Module,
    example_inputs: Any,
    backend: str,
    fingerprint: Fingerprint,
    graph: ChannelGraph | None,
    folder: Path,
) -> KernelGraph:
    from edgeprune.graph.tracing import trace
    from edgeprune.lowering.kernel_graph import lower

    traced = trace(model, example_inputs) if graph is None else graph
    return lower(traced, backend, model=model, device=fingerprint, workdir=folder)


def _require_runtime(kernel_graph: KernelGraph, fingerprint: Fingerprint, board: Board) -> None:
    for requirement in kernel_graph.backend.requirements(fingerprint):
        if not requirement.met:
            raise BackendUnavailableError(
                f"board {board.name} must have {requirement.field} {requirement.needed}, found {requirement.found}.",
                hint=requirement.hint,
            )


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}.jsonl")


def _own_version() -> str:
    try:
        return version("edgeprune")
    except PackageNotFoundError:
        return "source"


def _silent(done: int, total: int, left_s: float, message: str) -> None:
    """No progress was asked for."""
