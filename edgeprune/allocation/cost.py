"""Predicted latency of candidate widths: kernel graph + predictor, memoised, and the stair edges that it has."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeprune.allocation._base import Rules, Widths
from edgeprune.allocation.choices import Choice, choices
from edgeprune.errors import ConfigError
from edgeprune.graph.branches import emptied
from edgeprune.latency.calibration import Totals

if TYPE_CHECKING:
    from edgeprune.graph.forms import SizeForm
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.spec import Kernel


class CostModel:
    """Latency by widths, as a predictor sees the kernels of a kernel graph.

    A candidate costs one walk through the backend's layout rule; each different kernel is predicted once, all new kernels
    of a batch of candidates together.

    Args:
        kernel_graph: Kernels of the model at any widths.
        predictor: Fitted on a table of the board.
        rules: What widths must respect, by group name; candidates respect it, tied groups move together.
        noise: A latency must fall by more than this share of the latency of the kernels that a group touches, to count as
            a step of the staircase. Predictions of neighboring widths scatter by some percent, which is no step.
        max_probes: Most widths per group at which the staircase is looked at.
        about_ms: Latency of the networks that are looked for, milliseconds; the dense one's by default. What a kernel pays
            among others is what it pays in such a network, so that parts add up (`Predictor.near`).
    """

    def __init__(
        self,
        kernel_graph: KernelGraph,
        predictor: Predictor,
        *,
        rules: Rules | None = None,
        noise: float = 0.03,
        max_probes: int = 96,
        about_ms: float | None = None,
    ) -> None:
        if not 0 <= noise < 1:
            raise ConfigError(f"noise must be a share in [0, 1), found {noise}.")
        if max_probes < 2:
            raise ConfigError(f"max_probes must be at least 2, found {max_probes}.")
        self.kernel_graph, self._any_predictor, self._about_ms = kernel_graph, predictor, about_ms
        self.noise, self.max_probes = noise, max_probes
        self.choices: tuple[Choice, ...] = choices(kernel_graph.graph.groups, rules)
        self._dense = dict(kernel_graph.graph.widths())
        self._choice_of = {name: choice for choice in self.choices for name in choice.groups}
        self._kernel_ms: dict[Kernel, float] = {}
        self._intervals: dict[tuple[int, ...], tuple[float, float, float]] = {}
        self._candidates: dict[tuple[str, ...], tuple[int, ...]] = {}

    @cached_property
    def predictor(self) -> Predictor:
        """For networks of about the latency that is looked for."""
        return self._any_predictor.near(self.kernels({}), self._taken_ms)

    @cached_property
    def _taken_ms(self) -> float:
        return self._predicted_ms({}) if self._about_ms is None else self._about_ms

    def _predicted_ms(self, widths: Widths) -> float:
        """Latency of a network at its own prices, milliseconds."""
        kernels = self.kernels(widths)
        return self._any_predictor.calibration_of(kernels).ms(Totals.of(kernels, self.kernels_ms(kernels)))

    def about(self, ms: float) -> CostModel:
        """The same at the prices of networks of about another latency, milliseconds; candidates are the same."""
        found = copy.copy(self)
        for known in ("predictor", "_taken_ms"):
            found.__dict__.pop(known, None)
        found._about_ms, found._intervals = ms, {}
        return found

    def as_long_as(self, widths: Widths) -> CostModel:
        """The same at the prices of networks of just the length that a network of these widths has."""
        taken_ms = self._predicted_ms(widths)
        return self if taken_ms == self._taken_ms else self.about(taken_ms)

    @property
    def dense_ms(self) -> float:
        """Predicted latency at full widths, milliseconds."""
        return self.ms({})

    def ms(self, widths: Widths) -> float:
        """Predicted latency of the whole network, milliseconds; groups left out are dense."""
        return self.interval(widths)[0]

    def many_ms(self, many: Sequence[Widths]) -> npt.NDArray[np.float64]:
        """`ms` of each, shape (len(many),)."""
        return np.array([interval[0] for interval in self._many(many)], dtype=np.float64)

    def interval(self, widths: Widths) -> tuple[float, float, float]:
        """Predicted latency with its interval: (ms, low_ms, high_ms)."""
        return self._many([widths])[0]

    def kernels(self, widths: Widths) -> list[Kernel]:
        """The kernels that run at these widths, in order; where the lead of a branch has width 0, none of the branch."""
        return self.kernel_graph.at(emptied(self.kernel_graph.graph.branches, {**self._dense, **widths}))

    def kernels_ms(self, kernels: Iterable[Kernel]) -> list[float]:
        """Predicted latency of each kernel alone, milliseconds."""
        wanted = list(kernels)
        unseen = [kernel for kernel in dict.fromkeys(wanted) if kernel not in self._kernel_ms]
        if unseen:
            found = self._any_predictor.kernel_ms(unseen)
            self._kernel_ms.update(zip(unseen, (float(value) for value in found), strict=True))
        return [self._kernel_ms[kernel] for kernel in wanted]

    def parts_ms(self, many: Sequence[Widths]) -> list[dict[str, float]]:
        """Per widths, what each part of the network takes, milliseconds; they add up to `ms`.

        A part is named after the first program node that its kernels compute; what a network pays once is ``""``. The
        calibration is shared out: a kernel's own time scaled, what each kernel adds, and what its weights do.
        """
        lowered = [self.kernels(widths) for widths in many]
        self.kernels_ms(kernel for kernels in lowered for kernel in kernels)
        return [self.shared_out(kernels) for kernels in lowered]

    def shared_out(self, kernels: Sequence[Kernel]) -> dict[str, float]:
        """What each part of a network of these kernels takes, as in `parts_ms`."""
        calibration = self.predictor.calibration_of(kernels)
        parts = {"": calibration.fixed_ms}
        for kernel, ms in zip(kernels, self.kernels_ms(kernels), strict=True):
            part = kernel.origin[0] if kernel.origin else ""
            parts[part] = parts.get(part, 0.0) + calibration.part_ms(Totals.of([kernel], [ms]))
        return parts

    def forms_of(self, part: str) -> tuple[SizeForm, ...]:
        """The sizes in the shapes of the operators that a part consists of, as forms in group widths."""
        return self.kernel_graph.forms(part)

    def candidates(self, group: str) -> tuple[int, ...]:
        """Stair edges of a group, descending, the full size first.

        Walking down from the full size with all others dense, a width is kept when the predicted latency is below that of
        every wider one by more than the noise: on each step of the staircase the widest, and none that a wider one beats.
        """
        choice = self._choice_of[group]
        if choice.groups not in self._candidates:
            self._candidates[choice.groups] = self._edges(choice)
        return self._candidates[choice.groups]

    def held_by(self, widths: Widths) -> str:
        """What the latency at these widths consists of: kernels that no width changes, and those at their smallest."""
        kernels = self.kernels(widths)
        movable = [choice for choice in self.choices if not choice.frozen]
        floor = self.kernels({name: choice.allowed[-1] for choice in movable for name in choice.groups})
        fixed = Counter(self.kernels({})) & Counter(floor)
        times = self.kernels_ms(kernels)
        total = sum(times)
        held = 0.0
        for kernel, kernel_ms in zip(kernels, times, strict=True):
            if fixed[kernel] > 0:
                fixed[kernel] -= 1
                held += kernel_ms
        share = held / total if total > 0 else 0.0
        frozen = sum(len(choice.groups) for choice in self.choices if choice.frozen)
        return (
            f"kernels that no width changes hold {share:.0%} of it, kernels at their smallest widths {1 - share:.0%}; "
            f"{frozen} of {len(self._dense)} groups are frozen"
        )

    def _edges(self, choice: Choice) -> tuple[int, ...]:
        probes = self._probes(choice)
        latencies = self.many_ms([dict.fromkeys(choice.groups, width) for width in probes])
        dense = Counter(self.kernels({}))
        touched = dense - Counter(self.kernels(dict.fromkeys(choice.groups, probes[-1])))
        least_drop = self.noise * sum(self.kernels_ms(touched.elements()))
        edges, lowest = [probes[0]], float(latencies[0])
        for width, latency in zip(probes[1:], latencies[1:], strict=True):
            if latency < lowest - least_drop:
                edges.append(width)
                lowest = float(latency)
        return tuple(edges)

    def _probes(self, choice: Choice) -> tuple[int, ...]:
        """The allowed widths, or where there are too many, the multiples of a power of two among them and both ends."""
        probes, step = choice.allowed, 1
        while len(probes) > self.max_probes:
            step *= 2
            probes = tuple(
                width
                for width in choice.allowed
                if width % step == 0 or width in (choice.allowed[0], choice.allowed[-1])
            )
        return probes

    def _many(self, many: Sequence[Widths]) -> list[tuple[float, float, float]]:
        keys = [self._key(widths) for widths in many]
        unseen = {key: widths for key, widths in zip(keys, many, strict=True) if key not in self._intervals}
        if unseen:
            lowered = {key: self.kernels(widths) for key, widths in unseen.items()}
            # One call for all new kernels: a regressor's cost per call is that of hundreds of rows.
            self.kernels_ms(kernel for kernels in lowered.values() for kernel in kernels)
            for key, kernels in lowered.items():
                ms, low_ms, high_ms = self.predictor.network(kernels)
                self._intervals[key] = (float(ms), float(low_ms), float(high_ms))
        return [self._intervals[key] for key in keys]

    def _key(self, widths: Widths) -> tuple[int, ...]:
        unknown = [name for name in widths if name not in self._dense]
        if unknown:
            raise ConfigError(f"widths must name groups of the model, found {', '.join(sorted(unknown))}.")
        return tuple(widths.get(name, size) for name, size in self._dense.items())
