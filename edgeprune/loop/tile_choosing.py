"""From damage curves of tiles and a budget to a plan, and what that is predicted to take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from edgeprune.errors import EmptyPlanError
from edgeprune.loop.tile_aims import within_latency
from edgeprune.loop.tile_costs import counted, plan_of, power_share, powered, priced, require_kernels
from edgeprune.loop.tile_energy import Energies, Pricing

if TYPE_CHECKING:
    from edgeprune.allocation.tiles.problem import TileAllocation, TileProblem, TileSearch
    from edgeprune.budget import Budget
    from edgeprune.criteria.tiles.curves import TileCurve
    from edgeprune.criteria.tiles.sums import Floats
    from edgeprune.latency.predictor import Predictor
    from edgeprune.loop.planning import Progress
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.surgery.plan import PruningPlan


@dataclass(frozen=True)
class Chosen:
    """A plan with tiles; nothing has been cut yet.

    Attributes:
        allocation: Of the search.
        plan: What to cut.
        cost: Of the plan as a whole, in the unit of the budget.
        aim: What it had to stay below.
        merged: Weight to products before and after some were merged.
    """

    allocation: TileAllocation
    plan: PruningPlan
    cost: float
    aim: float
    merged: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Choosing(ABC):
    """Makes plans with tiles for one model; what does not depend on the budget is done once.

    Args:
        kernel_graph: The lowered dense model.
        predictor: Of the device; None where the budget is one of multiply-accumulates.
        latency: Whether costs are milliseconds.
    """

    what = "tiles"

    def __init__(self, kernel_graph: KernelGraph, predictor: Predictor | None, *, latency: bool) -> None:
        self.kernel_graph, self.predictor, self.latency = kernel_graph, predictor, latency

    @property
    @abstractmethod
    def dense(self) -> float:
        """Cost of the dense model, milliseconds or multiply-accumulates."""

    @property
    @abstractmethod
    def curves(self) -> Mapping[str, TileCurve]:
        """Damage by weight, all channels there."""

    @abstractmethod
    def choose(self, at_most: float) -> Chosen:
        """The plan with the least damage whose cost is within a budget.

        Raises:
            BudgetInfeasibleError: None is.
        """

    def power_share(self, plan: PruningPlan) -> float | None:
        """Power of a plan as a share of the dense model's; None where power does not count."""
        del plan
        return None

    @property
    def power_of(self) -> str:
        """What that is the power of, and how it is known; empty where power does not count."""
        return ""

    def notes(self, chosen: Chosen) -> tuple[str, ...]:
        """What a person should know of a choice."""
        allocation = chosen.allocation
        notes = (f"Tiles per layer, found by {allocation.method}: {allocation.note}",) if allocation.note else ()
        return (*notes, *self._merged(chosen))

    def _merged(self, chosen: Chosen) -> Iterator[str]:
        if chosen.merged:
            layers = ", ".join(f"{name} {before} to {after}" for name, (before, after) in chosen.merged.items())
            yield f"Block rows with similar tiles read the same ones, as that is predicted to be faster; products: {layers}."

    def at_most(self, budget: Budget) -> float:
        """A budget as a cost.

        Raises:
            EmptyPlanError: The dense model is within it.
        """
        if self.latency:
            found, unit = budget.resolve_ms(self.dense), "ms"
        elif budget.energy_mj or budget.energy_ratio:
            found, unit = budget.energy_mj or (budget.energy_ratio or 1.0) * self.dense, "mJ"
        else:
            found, unit = budget.macs or (budget.macs_ratio or 1.0) * self.dense, "multiply-accumulates"
        if found >= self.dense:
            raise EmptyPlanError(
                f"a budget of {self.what} must be below what the dense model costs, {self.dense:.6g} {unit}, found {budget}."
            )
        return float(found)

    def latencies(self, plan: PruningPlan) -> tuple[float | None, float | None, tuple[str, ...]]:
        """Predicted milliseconds of the dense and the pruned model, None without a predictor; and a note on guesses."""
        if self.predictor is None:
            return None, None, ()
        kernels = self.kernel_graph.of_plan(plan)
        sources = self.predictor.predict(kernels)["source"]
        guessed = sorted({one.op for one, source in zip(kernels, sources, strict=True) if source == "fallback"})
        notes: tuple[str, ...] = ()
        if guessed:
            notes = (
                f"The latency table holds no {', '.join(guessed)}: what these take is a guess from what their memory traffic is; "
                "edgeprune profile MODEL --table TABLE --tiles ROWSxCOLUMNS measures them.",
            )
        return self.predictor.network_ms(self.kernel_graph.at({})), self.predictor.network_ms(kernels), notes


class TileChoosing(Choosing):
    """Tiles alone; channels stay.

    Args:
        kernel_graph: The lowered dense model.
        predictor: Of the device, or None.
        curves: Damage by weight.
        tokens: Rows that enter each layer.
        search: How many tiles each layer keeps.
        damages: Damage of each tile alone, by weight; None merges no products.
        latency: Whether costs are milliseconds.
        energy: Whether they are millijoules.
        power_weight: What power is worth, see `edgeprune.loop.tile_costs.powered`; 0 does not count it.
        progress: Called with (step, done, in all).
    """

    def __init__(
        self,
        kernel_graph: KernelGraph,
        predictor: Predictor | None,
        curves: Mapping[str, TileCurve],
        tokens: Mapping[str, int],
        search: TileSearch,
        *,
        damages: Mapping[str, Floats] | None = None,
        latency: bool,
        energy: bool = False,
        power_weight: float = 0.0,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(kernel_graph, predictor, latency=latency)
        self._pricing: Pricing | None = None
        if predictor is not None and (latency or energy):
            self._pricing = Energies(predictor) if energy else predictor
        self._unit = "mJ" if energy else "ms"
        self._curves, self._tokens, self._search, self._progress = curves, tokens, search, progress
        self._damages, self._power_weight = damages, power_weight

    @property
    def dense(self) -> float:
        """See `Choosing.dense`."""
        problem = self._problem  # first: it says what a table lacks
        if self._pricing is not None:
            return self._pricing.network_ms(self.kernel_graph.at({}))
        return problem.dense

    @property
    def curves(self) -> Mapping[str, TileCurve]:
        """See `Choosing.curves`."""
        return self._curves

    def choose(self, at_most: float) -> Chosen:
        """See `Choosing.choose`."""
        if self._pricing is not None:
            found = within_latency(
                self._problem, self._search, self.kernel_graph, self._pricing, at_most, self._damages
            )
            return Chosen(found.allocation, found.plan, found.cost, at_most, found.merged)
        allocation = self._search.search(self._problem, at_most)
        plan = plan_of(self.kernel_graph, self._curves, allocation.counts)
        if self.predictor is not None:
            require_kernels(self.kernel_graph, self.predictor, plan)
        return Chosen(allocation, plan, allocation.cost, at_most)

    def power_share(self, plan: PruningPlan) -> float | None:
        """See `Choosing.power_share`."""
        fixed = 0.0 if self._energies is None else self._energies.fixed
        return power_share(self._problem, plan, fixed)

    @property
    def power_of(self) -> str:
        """See `Choosing.power_of`."""
        if not self._power_weight:
            return ""
        if self._energies is not None:
            return "energy above idle, predicted from the energies that the table holds"
        return "power of the layers, modelled by kept tiles and the rows that stream through them"

    def notes(self, chosen: Chosen) -> tuple[str, ...]:
        """See `Choosing.notes`."""
        share = self.power_share(chosen.plan)
        if share is None:
            return super().notes(chosen)
        return (*super().notes(chosen), f"{self.power_of[0].upper()}{self.power_of[1:]}: {share:.1%} of dense.")

    @cached_property
    def _energies(self) -> TileProblem | None:
        """Layers with predicted millijoules as their cost, where power counts and the table holds energies."""
        if not self._power_weight or self.predictor is None or self.predictor.energy is None:
            return None
        return priced(self.kernel_graph, Energies(self.predictor), self._curves, unit="mJ", progress=self._progress)

    @cached_property
    def _problem(self) -> TileProblem:
        if self._pricing is not None:
            found = priced(self.kernel_graph, self._pricing, self._curves, unit=self._unit, progress=self._progress)
        else:
            found = counted(self.kernel_graph, self._curves, self._tokens)
        if not self._power_weight:
            return found
        return powered(found, self._tokens, self._power_weight, self._energies)
