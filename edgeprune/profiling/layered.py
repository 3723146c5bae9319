"""Kernels that are timed as layers of whole networks, where a runtime times its layers and cannot run one by itself.

Every timing of every network times all of its layers, in the surroundings that they have there. So a kernel that many
networks run is timed often, and what is chosen to be measured are networks, not kernels.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from edgeprune.errors import ConfigError, UnsupportedKernelError
from edgeprune.latency.csv_import import repeated
from edgeprune.profiling import design, space
from edgeprune.profiling.assembling import Part
from edgeprune.profiling.measuring import Progress, measure
from edgeprune.profiling.selecting import FILL, ROUNDS, Selection, unknown
from edgeprune.profiling.subjects import Candidate, Subject
from edgeprune.spec import Kernel

if TYPE_CHECKING:
    from edgeprune.backends._base import Backend
    from edgeprune.boards.board import Board
    from edgeprune.latency.predictor import Predictor
    from edgeprune.profiling.setting import Setting

logger = logging.getLogger("edgeprune.profiling")

LEAST_NETWORKS, MOST_NETWORKS = 6, 48
"""Per model: fewer say too little of how sums of layers become networks, more repeat what there is."""

_EVERY = 6
"""Networks between two sentinels."""


def select_networks(
    subjects: Sequence[Subject],
    left_s: float,
    build_s: float,
    timing_s: float,
    *,
    seed: int,
    predictor: Predictor | None = None,
) -> Selection:
    """Choose as many networks as fit into the time.

    Args:
        subjects: The models, the sentinel's first.
        left_s: Time for building and measuring, seconds.
        build_s: What building the engine of one network takes about, seconds.
        timing_s: What one timing of one takes, seconds.
        seed: Of the drawn candidates.
        predictor: Of the table that is extended: networks that it holds are left out.
    """
    in_rounds_s = ROUNDS * timing_s * (1 + 1 / _EVERY) / FILL
    fitting = int(left_s / (build_s + in_rounds_s) / len(subjects))
    count = min(MOST_NETWORKS, max(LEAST_NETWORKS, fitting))
    every_network = [design.networks(subject.kernel_graph, count, seed=seed) for subject in subjects]
    networks = [unknown(subject, chosen, predictor) for subject, chosen in zip(subjects, every_network, strict=True)]
    measured = sum(map(len, networks))
    logger.info("building and measuring %d networks", measured)
    return Selection(
        (),
        tuple(map(tuple, networks)),
        _EVERY,
        measured * (build_s + in_rounds_s),
        wanted=sum(map(len, every_network)),
    )


def selected(board: Board, setting: Setting, begun: float, tell: Progress) -> Selection:
    """Choose what fits into the time, from building and timing the dense networks once or from what is usual.

    Args:
        board: Held.
        setting: Of the run; kernels are timed as layers.
        begun: When the run began, as `time.monotonic` tells it.
        tell: Told what happens.

    Raises:
        UnsupportedKernelError: No kernel of the dense networks has a layer of its own.
    """
    times = setting.layer_times
    assert times is not None
    seconds, subjects = setting.seconds, setting.subjects
    if setting.predictor is not None:
        tell(0, 0, seconds, "choosing networks")
        return usual(setting)
    tell(0, 0, seconds, "building the engine of the dense network")
    start = time.monotonic()
    engines: dict[str, bytes | Path] = {
        subject.network(0): subject.kernel_graph.network_engine(space.group_sizes(subject.kernel_graph))
        for subject in subjects
    }
    build_s = (time.monotonic() - start) / len(engines)
    tell(0, 0, seconds, "timing the dense network")
    quick = measure(
        board,
        engines,
        runtime=setting.runtime,
        rounds=1,
        max_repeats=0,
        patience=0.0,
        wait_s=setting.wait_s,
        timing_s=times.timing_s,
    )
    # A network whose layers tell nothing is refused before minutes are spent on others.
    dense: dict[str, tuple[int, Candidate]] = {
        subject.network(0): (place, space.group_sizes(subject.kernel_graph)) for place, subject in enumerate(subjects)
    }
    with_layers(Part(quick, {}, {}), setting, dense, engines)
    # The sentinel opens and closes the round.
    timing_s = quick.spent_s / (len(engines) + 1)
    tell(0, 0, seconds, "choosing networks")
    left_s = max(0.5 * seconds, seconds - (time.monotonic() - begun))
    return select_networks(subjects, left_s, build_s, timing_s, seed=setting.seed)


def usual(setting: Setting) -> Selection:
    """What `selected` chooses where nothing may be built, or a table is extended."""
    times = setting.layer_times
    assert times is not None
    return select_networks(
        setting.subjects,
        setting.seconds,
        times.build_s,
        times.timing_s,
        seed=setting.seed,
        predictor=setting.predictor,
    )


def with_layers(
    part: Part,
    setting: Setting,
    networks: Mapping[str, tuple[int, Candidate]],
    engines: Mapping[str, bytes | Path],
) -> Part:
    """The part with the kernels that were timed as layers of its networks; as it is where layers were not timed.

    Kernels that the extended table holds are its anchors.

    Args:
        part: What was measured.
        setting: Of the run.
        networks: Name of each network to its model's place and what it is; none is without some tiles.
        engines: Engines of these networks.

    Raises:
        UnsupportedKernelError: No kernel of the networks has a layer of its own.
    """
    if setting.layer_times is None:
        return part
    times: dict[Kernel, list[float]] = {}
    wanted: dict[Kernel, None] = {}
    for name, (place, candidate) in networks.items():
        kernel_graph, engine = setting.subjects[place].kernel_graph, engines[name]
        widths = setting.subjects[place].widths(candidate)
        wanted |= dict.fromkeys(kernel_graph.at(widths))
        for layers in part.run.layers.get(name, ()):
            content = engine if isinstance(engine, bytes) else engine.read_bytes()
            once: dict[Kernel, list[float]] = {}
            for kernel, ms in kernel_graph.layer_kernels(widths, content, layers):
                once.setdefault(kernel, []).append(ms)
            for kernel, found in once.items():
                times.setdefault(kernel, []).append(mean(found))
    if not times:
        raise UnsupportedKernelError(
            "kernels must have layers of their own to be timed, found none: the runtime computes the whole network as one, or "
            "does not tell its layers.",
            hint="edgeprune prune --latency with a table of another backend, then compile for this one",
        )
    measured = {_id(kernel): repeated(found) for kernel, found in times.items()}
    held: frozenset[Kernel] = frozenset() if setting.table is None else frozenset(setting.table.kernels)
    run = replace(
        part.run,
        measurements={**part.run.measurements, **measured},
        rounds={**part.run.rounds, **{name: found.rounds_ms for name, found in measured.items()}},
    )
    missing = [kernel for kernel in wanted if kernel not in times and kernel not in held]
    return Part(
        run,
        {_id(kernel): kernel for kernel in times if kernel not in held},
        {**part.unsupported, **{kernel.key: _reason(kernel) for kernel in missing}},
        {_id(kernel): kernel for kernel in times if kernel in held},
    )


def refuse_heating(backend: Backend) -> None:
    """Refuse at once what would only fail after all timing.

    Args:
        backend: Whose engines are measured.

    Raises:
        ConfigError: Its engines only run in processes of their own.
    """
    if backend.layer_times is not None:
        raise ConfigError(
            "a sustained latency must be measured with engines that heat the board and are timed without a pause in between, "
            f"those of {backend.name} are loaded by a process of their own each time, and the board cools meanwhile.",
            hint="profile without --sustained; --energy and --percentiles work",
        )


def _id(kernel: Kernel) -> str:
    return hashlib.sha256(kernel.key.encode()).hexdigest()[:16]


def _reason(kernel: Kernel) -> str:
    return f"the runtime has no layer that computes {kernel.op}, and nothing else."
