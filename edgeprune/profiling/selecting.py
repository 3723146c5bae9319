"""What one profiling run measures: as many kernels and networks as its time holds, less what a table knows already."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.latency.likeness import grouped, skeleton
from edgeprune.profiling import design, extending, space, tiled_draws
from edgeprune.profiling.subjects import Candidate, Subject
from edgeprune.profiling.tiled_draws import TiledDraw
from edgeprune.spec import Kernel

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor
    from edgeprune.latency.table import LatencyTable

logger = logging.getLogger("edgeprune.profiling")

ROUNDS = 3
SAMPLES, SAMPLE_MS, WARMUP_MS = 5, 4.0, 10.0
# Share of the measuring time that the estimate may fill; what loading one engine, and starting one call, costs in a round.
FILL, _LOAD_MS, _START_MS = 0.8, 6.0, 800.0
_NETWORKS_MOST, _NETWORKS_LEAST, _NETWORKS_SHARE = 12, 4, 0.35
_PASSES_SHARE, _PASSES_MOST = 0.12, 8
"""Share of the measuring time in which the networks are timed again and again, and how often a round does so at most."""
_NETWORKS_FURTHER, _FURTHER_SHARE, _FURTHER_MOST = 6, 0.3, 32
"""The same of a further model: what it shares with those of the table is known, so there are fewer networks, and hardly a
kernel to measure besides. A run of a few seconds would see one state of the machine's caches, and take it for the model's."""
_SENTINEL_SHARE = 0.15
_LEAST_KERNELS = 8
_REFINE_SHARE = 0.3
LEAST_REFINE_S = 8.0
"""A shorter time than this for what the first measurements suggest is better spent on the first measurements."""
# The time of a long network falls with its widths; two thirds of the dense one is about the mean of `design.networks`.
_MEAN_NETWORK = 2 / 3


@dataclass(frozen=True)
class Selection:
    """What a profiling run measures first.

    Attributes:
        kernels: Kernels that are measured by themselves.
        networks: Per model the widths of the networks that are measured whole, the dense one first.
        every: Items between two sentinels.
        budget_s: Time for all rounds of this and of later stages together, seconds.
        anchors: Kernels of the extended table that are measured again.
        wanted: Kernels and networks that were wanted, those that the table knows included.
        refine_s: Part of `budget_s` for what is chosen by what the first measurements say; 0 where it is too short.
        refine: About how many kernels that is.
        passes: How often a round measures each network.
        tiled: Per model its networks without some tiles that are measured whole.
    """

    kernels: tuple[Kernel, ...]
    networks: tuple[tuple[space.Widths, ...], ...]
    every: int
    budget_s: float
    anchors: tuple[Kernel, ...] = ()
    wanted: int = 0
    refine_s: float = 0.0
    refine: int = 0
    passes: int = 1
    tiled: tuple[tuple[TiledDraw, ...], ...] = ()

    def candidates(self, subjects: Sequence[Subject]) -> dict[str, tuple[int, Candidate]]:
        """Name of each network that is measured whole to the place of its model and what it is, dense ones before others."""
        found: dict[str, tuple[int, Candidate]] = {}
        for place, (subject, chosen) in enumerate(zip(subjects, self.networks, strict=True)):
            found |= {subject.network(number): (place, widths) for number, widths in enumerate(chosen)}
            drawn = self.tiled[place] if self.tiled else ()
            found |= {subject.tiled_network(number): (place, draw) for number, draw in enumerate(drawn)}
        return found

    def record(self) -> dict[str, Any]:
        """As a journal's record."""
        return {
            "kind": "selection",
            "kernels": [kernel.key for kernel in self.kernels],
            "networks": [list(networks) for networks in self.networks],
            "every": self.every,
            "budget_s": self.budget_s,
            "anchors": [kernel.key for kernel in self.anchors],
            "wanted": self.wanted,
            "refine_s": self.refine_s,
            "refine": self.refine,
            "passes": self.passes,
            "tiled": [[draw.record() for draw in drawn] for drawn in self.tiled],
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Selection:
        """From a journal's record."""
        return cls(
            tuple(Kernel.from_key(key) for key in record["kernels"]),
            tuple(tuple(networks) for networks in record["networks"]),
            record["every"],
            record["budget_s"],
            tuple(Kernel.from_key(key) for key in record["anchors"]),
            record["wanted"],
            record["refine_s"],
            record["refine"],
            record.get("passes", 1),
            tuple(tuple(map(TiledDraw.from_record, drawn)) for drawn in record.get("tiled", ())),
        )


@dataclass(frozen=True)
class Preview:
    """What a profiling run would measure.

    Attributes:
        wanted: Kernels and networks that a predictor for these models is fitted to.
        kernels: Kernels to measure.
        networks: Networks to measure.
        minutes: About how long that takes.
    """

    wanted: int
    kernels: int
    networks: int
    minutes: float

    @property
    def to_measure(self) -> int:
        """Kernels and networks to measure."""
        return self.kernels + self.networks

    @property
    def known(self) -> int:
        """Those that the table knows already."""
        return self.wanted - self.to_measure

    def __str__(self) -> str:
        known = f"{self.known} of {self.wanted} known"
        if not self.to_measure:
            return f"{known}, nothing to measure"
        return f"{known}, {self.to_measure} to measure, {self.minutes:.1f} min"


def preview_of(selection: Selection, subjects: Sequence[Subject], table: LatencyTable | None) -> Preview:
    """What a person is told of a selection."""
    # The dense network of a model that the table holds is measured as the sentinel, and not for its own sake.
    networks = sum(
        len(chosen) - (subject.dense_in(table) is not None)
        for subject, chosen in zip(subjects, selection.networks, strict=True)
    )
    networks += sum(map(len, selection.tiled))
    kernels = len(selection.kernels) + selection.refine
    return Preview(selection.wanted, kernels, networks, selection.budget_s / 60 if kernels + networks else 0.0)


def select(
    subjects: Sequence[Subject],
    dense_ms: Sequence[float],
    left_s: float,
    *,
    seed: int,
    predictor: Predictor | None = None,
) -> Selection:
    """Choose what fits into the time.

    Args:
        subjects: The models, the sentinel's first.
        dense_ms: About how long each of them takes, dense, milliseconds.
        left_s: Time for measuring, seconds.
        seed: Of the drawn candidates.
        predictor: Of the table that is extended: what it knows is left out, and no more time is taken than the rest needs.
    """
    isa = subjects[0].kernel_graph.isa
    refine_s = _refine_s(left_s)
    round_ms = FILL * 1e3 * (left_s - refine_s) / ROUNDS
    mean_ms = [item_ms(ms * _MEAN_NETWORK) for ms in dense_ms]
    fitting = int(_NETWORKS_SHARE * round_ms / sum(mean_ms))
    most_networks = _NETWORKS_MOST if predictor is None else _NETWORKS_FURTHER
    count = min(most_networks, max(_NETWORKS_LEAST, fitting))
    every_network = [design.networks(subject.kernel_graph, count, seed=seed) for subject in subjects]
    networks = [unknown(subject, chosen, predictor) for subject, chosen in zip(subjects, every_network, strict=True)]
    every_tiled = [tiled_draws.networks(subject.tiles, seed=seed) for subject in subjects]
    tiled = [_unknown_tiled(subject, drawn, predictor) for subject, drawn in zip(subjects, every_tiled, strict=True)]
    whole_ms = sum((count + len(drawn)) * ms for drawn, ms in zip(tiled, mean_ms, strict=True))
    share, most_passes = (_PASSES_SHARE, _PASSES_MOST) if predictor is None else (_FURTHER_SHARE, _FURTHER_MOST)
    passes = max(1, min(most_passes, int(share * round_ms / whole_ms)))
    left_ms = round_ms - passes * whole_ms
    most = max(_LEAST_KERNELS, int(left_ms / item_ms(0.0)))
    reached = space.reach(
        [subject.kernel_graph for subject in subjects],
        seed=seed,
        draws=max(40, min(300, most)),
        further=[kernels for subject in subjects for kernels in subject.tiled(seed)],
    )
    ordered = space.ordered(reached, most)
    pace = dense_ms[0] / float(space.price(list(subjects[0].dense().elements()), isa).sum())
    costs_ms = dict(zip(ordered, (item_ms(pace * float(cost)) for cost in space.price(ordered, isa)), strict=True))
    every = _every(list(costs_ms.values()), item_ms(dense_ms[0]))
    sentinel_ms = item_ms(dense_ms[0]) / every
    wanted = _affordable(ordered, costs_ms, left_ms, sentinel_ms)
    typical_ms = sum(costs_ms.values()) / len(costs_ms) + sentinel_ms
    if predictor is None:
        refine = affordable(refine_s, typical_ms, item_ms(dense_ms[0]))
        whole = sum(map(len, networks)) + sum(map(len, tiled))
        logger.info("measuring %d of %d kernels and %d networks", len(wanted), len(ordered), whole)
        return Selection(
            tuple(wanted),
            tuple(map(tuple, networks)),
            every,
            left_s,
            wanted=len(wanted) + whole + refine,
            refine_s=refine_s,
            refine=refine,
            passes=passes,
            tiled=tuple(map(tuple, tiled)),
        )
    missing = extending.lacking(wanted, reached, predictor)
    anchors = extending.anchors(predictor.table)
    needed_ms = sum(costs_ms[kernel] + sentinel_ms for kernel in missing) + len(anchors) * (item_ms(0.0) + sentinel_ms)
    further_ms = sum(
        (len(chosen) + len(drawn)) * ms for chosen, drawn, ms in zip(networks, tiled, mean_ms, strict=True)
    )
    needed_ms += passes * (further_ms + item_ms(dense_ms[0]))  # a sentinel beside each pass
    needed_s = min(left_s - refine_s, needed_ms * ROUNDS / 1e3 / FILL)
    # A model of a kind that the table hardly knows is looked into as a first one is.
    refine_s = _refine_s(needed_s / (1 - _REFINE_SHARE)) if 2 * len(missing) > len(wanted) else 0.0
    refine = affordable(refine_s, typical_ms, item_ms(dense_ms[0]))
    return Selection(
        tuple(missing),
        tuple(map(tuple, networks)),
        every,
        needed_s + refine_s,
        tuple(anchors),
        wanted=len(wanted) + sum(map(len, every_network)) + sum(map(len, every_tiled)) + refine,
        refine_s=refine_s,
        refine=refine,
        passes=passes,
        tiled=tuple(map(tuple, tiled)),
    )


def _refine_s(left_s: float) -> float:
    return _REFINE_SHARE * left_s if _REFINE_SHARE * left_s >= LEAST_REFINE_S else 0.0


def affordable(left_s: float, kernel_ms: float, sentinel_ms: float) -> int:
    """How many kernels one further stage can measure in a time, its start and its sentinels paid for.

    Args:
        left_s: The time, seconds.
        kernel_ms: What one kernel takes in one round, its share of sentinels included, milliseconds.
        sentinel_ms: What a sentinel takes, milliseconds.
    """
    round_ms = FILL * 1e3 * left_s / ROUNDS - _START_MS - 2 * sentinel_ms
    return max(0, int(round_ms / kernel_ms))


def guessed_dense_ms(subjects: Sequence[Subject], predictor: Predictor | None) -> list[float]:
    """About how long each model takes, dense, milliseconds: as the table has or predicts it, else a plain guess."""
    found = []
    for subject in subjects:
        kernels = list(subject.dense().elements())
        guesses = space.price(kernels, subject.kernel_graph.isa)
        if predictor is None:
            found.append(float(guesses.sum()))
            continue
        held = subject.dense_in(predictor.table)
        if held is not None:
            found.append(held.measurement.median_ms)
            continue
        known = extending.estimates(predictor, kernels)
        pairs = list(zip(kernels, guesses.tolist(), strict=True))
        priced = sum(guess for kernel, guess in pairs if kernel in known)
        pace = sum(known[kernel].ms for kernel, _ in pairs if kernel in known) / priced if priced else 1.0
        found.append(sum(known[kernel].ms if kernel in known else pace * guess for kernel, guess in pairs))
    return found


def item_ms(run_ms: float) -> float:
    """About how long one item takes in one round, milliseconds, when one run takes `run_ms`."""
    return 1.5 * max(WARMUP_MS, 2 * run_ms) + SAMPLES * max(SAMPLE_MS, run_ms) + _LOAD_MS


def _every(costs_ms: Sequence[float], sentinel_ms: float) -> int:
    """Items between two sentinels, so that these take a small share of the time."""
    mean_ms = sum(costs_ms) / len(costs_ms)
    return max(10, min(60, math.ceil(sentinel_ms / (_SENTINEL_SHARE * mean_ms))))


def _affordable(
    ordered: Sequence[Kernel], costs_ms: Mapping[Kernel, float], left_ms: float, sentinel_ms: float
) -> list[Kernel]:
    count, spent_ms = 0, 0.0
    for kernel in ordered:
        spent_ms += costs_ms[kernel] + sentinel_ms
        if spent_ms > left_ms and count >= _LEAST_KERNELS:
            break
        count += 1
    return list(ordered[:count])


def _unknown_tiled(subject: Subject, drawn: list[TiledDraw], predictor: Predictor | None) -> list[TiledDraw]:
    """The networks without some tiles that the table does not hold."""
    held = [] if predictor is None else predictor.table.networks
    known = {frozenset(network.kernels.items()) for network in held}
    keys = [Counter(kernel.key for kernel in subject.kernels(draw)) for draw in drawn] if known else []
    if not known:
        return drawn
    return [draw for draw, kernels in zip(drawn, keys, strict=True) if frozenset(kernels.items()) not in known]


def unknown(subject: Subject, chosen: list[space.Widths], predictor: Predictor | None) -> list[space.Widths]:
    """The networks of a model that are still to be measured, and in any case the dense one first."""
    held = [] if predictor is None else predictor.table.networks
    if subject.dense_in(None if predictor is None else predictor.table) is None:
        return chosen
    known = {frozenset(network.kernels.items()) for network in held}
    fresh = [
        widths
        for widths in chosen[1:]
        if frozenset(Counter(kernel.key for kernel in subject.kernel_graph.at(widths)).items()) not in known
    ]
    skeletons = [skeleton(Counter({Kernel.from_key(key): n for key, n in net.kernels.items()})) for net in held]
    alike = next(len(group) for group in grouped([skeleton(subject.dense()), *skeletons]) if 0 in group) - 1
    return [chosen[0], *fresh[: max(0, len(chosen) - alike)]]
