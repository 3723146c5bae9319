"""What is measured after the first selection: first what a fit on it doubts most, then the edges of the staircase.

Each stage is decided by what was measured before it and nothing else, and written to the journal before it is measured;
so a run that was killed decides the same again, or finds it decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.latency.fitting import fit
from edgeprune.profiling import extending, space, steps
from edgeprune.profiling.doubting import doubtful
from edgeprune.profiling.selecting import affordable, item_ms
from edgeprune.profiling.subjects import Subject
from edgeprune.spec import Kernel

if TYPE_CHECKING:
    from edgeprune.latency.table import LatencyTable

DOUBTED, STEPS = "doubted", "steps"

_DOUBTED_SHARE = 0.45
"""Share of the time for refining that goes to what the fit doubts; the rest hunts steps."""

_DRAWS = 100
_TURNS, _LEAST_TURN = 3, 8
"""One bisection takes a third of the time that is left, and no fewer kernels than make its start worth while."""

_LEAST_KERNELS = 4
_KERNELS_PER_LINE = 24


@dataclass(frozen=True)
class Stage:
    """Kernels that are measured together after the first selection.

    Attributes:
        why: `DOUBTED` or `STEPS`.
        kernels: Which.
        lines: For `STEPS`, place of the model and name of the group of each line.
    """

    why: str
    kernels: tuple[Kernel, ...]
    lines: tuple[tuple[int, str], ...] = ()

    def record(self) -> dict[str, Any]:
        """As a journal's record."""
        keys = [kernel.key for kernel in self.kernels]
        return {"kind": "stage", "why": self.why, "kernels": keys, "lines": [list(line) for line in self.lines]}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Stage:
        """From a journal's record."""
        kernels = tuple(Kernel.from_key(key) for key in record["kernels"])
        return cls(record["why"], kernels, tuple((place, group) for place, group in record["lines"]))


class Refinement:
    """Decides the stages of one run.

    Args:
        subjects: The models.
        dense_ms: What the sentinel takes, milliseconds.
        refine_s: Time for all stages together, seconds.
        seed: Of the drawn candidates.
    """

    def __init__(self, subjects: Sequence[Subject], dense_ms: float, refine_s: float, seed: int) -> None:
        self.subjects, self.dense_ms, self.refine_s, self.seed = subjects, dense_ms, refine_s, seed
        self._lines: list[steps.Line] = []

    def following(self, done: Sequence[Stage], table: LatencyTable, spent_s: float) -> Stage | None:
        """The next stage, or None where time or open questions are used up.

        Args:
            done: Stages that were measured.
            table: All that was measured.
            spent_s: What those stages took, seconds.
        """
        left_s = self.refine_s - spent_s
        if not done:
            count = self._count(_DOUBTED_SHARE * left_s)
            if count >= _LEAST_KERNELS:
                graphs = [subject.kernel_graph for subject in self.subjects]
                # Other candidates than the first selection was drawn from: what a fit has seen it hardly doubts.
                further = [kernels for subject in self.subjects for kernels in subject.tiled(self.seed + 2)]
                reached = space.reach(graphs, seed=self.seed + 2, draws=_DRAWS, further=further)
                found = doubtful(reached, fit(table, seed=self.seed), count)
                return Stage(DOUBTED, tuple(found))
        count = self._count(left_s)
        if count < _LEAST_KERNELS:
            return None
        hunted = self.lines(done, table, self._count(left_s))
        refused = [Kernel.from_key(key) for key in table.header.get("unsupported", {})]
        turn = min(count, max(_LEAST_TURN, count // _TURNS))
        found = steps.hunt(hunted, known_ms(table), turn, refused)
        if not found:
            return None
        return Stage(STEPS, tuple(found), tuple((self.subjects.index(line.subject), line.group) for line in hunted))

    def lines(self, done: Sequence[Stage], table: LatencyTable, count: int) -> list[steps.Line]:
        """The lines that are hunted on: chosen once, and the same from then on.

        Args:
            done: Stages that were measured.
            table: All that was measured.
            count: Kernels that there is time for; few allow few lines.
        """
        if not self._lines and not self._resume(done):
            predictor = fit(table, seed=self.seed)
            most = min(steps.LINES, max(1, count // _KERNELS_PER_LINE))

            def expected(kernels: Iterable[Kernel]) -> dict[Kernel, float]:
                return {kernel: found.ms for kernel, found in extending.estimates(predictor, kernels).items()}

            self._lines = steps.lines(self.subjects, expected, most)
        return self._lines

    def _resume(self, done: Sequence[Stage]) -> bool:
        """Take the lines from an earlier stage; False where none hunted."""
        named = next((stage.lines for stage in done if stage.why == STEPS), ())
        sizes = [space.group_sizes(subject.kernel_graph) for subject in self.subjects]
        self._lines = [steps.Line.of(self.subjects[place], group, sizes[place][group]) for place, group in named]
        return bool(named)

    def edges(self, done: Sequence[Stage], table: LatencyTable) -> list[dict[str, Any]]:
        """Stair edges that were found; see `steps.edges`."""
        if not self._lines and not self._resume(done):
            return []
        return steps.edges(self._lines, known_ms(table))

    def _count(self, left_s: float) -> int:
        return affordable(left_s, item_ms(0.0), item_ms(self.dense_ms))


def known_ms(table: LatencyTable) -> dict[Kernel, float]:
    """Measured kernels of a table, milliseconds."""
    return {kernel: table.measurements[kernel.key].median_ms for kernel in table.kernels}
