"""What an allocation is, and the one interface of all ways to find one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BudgetInfeasibleError, ConfigError

if TYPE_CHECKING:
    from edgeprune.allocation.terms import Limit
    from edgeprune.graph.channel_graph import ChannelGroup
    from edgeprune.surgery.constraints import WidthRule

Widths = Mapping[str, int]
Damage = Mapping[str, npt.NDArray[np.float64]]
"""Group name to damage by units kept, shape (size + 1,)."""
Rules = Mapping[str, "WidthRule"]
"""Group name to what its width must respect; a group that is not named is free."""


_AT_ONCE = 32
"""Plans whose latencies are asked for together."""


class Cost(Protocol):
    """Latency as a function of widths. Groups that a mapping does not name are dense."""

    def ms(self, widths: Widths) -> float:
        """Latency of the whole network, milliseconds."""

    def many_ms(self, many: Sequence[Widths]) -> npt.NDArray[np.float64]:
        """`ms` of each, shape (len(many),)."""

    def candidates(self, group: str) -> tuple[int, ...]:
        """Widths worth considering for a group, descending, the full size first."""


@runtime_checkable
class ExplainsFloor(Protocol):
    """A cost that can say what a latency consists of."""

    def held_by(self, widths: Widths) -> str:
        """A clause on what holds up the latency at these widths, e.g. ``"kernels without prunable axes hold 2.1 ms"``."""


@dataclass(frozen=True)
class Certificate:
    """What is known about how good an allocation is.

    Attributes:
        method: Name of the allocator.
        budget_ms: Latency that was asked for, milliseconds.
        predicted_ms: Latency of the widths by the cost model, milliseconds.
        damage: Total damage of the widths.
        bound: No widths within the budget (among the candidates) have less damage than this; None where the method proves
            nothing.
        evaluations: Number of latencies that were looked up.
        table_error: Largest relative difference that was found between the tables that `bound` is proven with and the cost
            model, at these widths and at random ones; 0 where the two are one, None where no tables were used.
        note: What a person should know, one sentence, or empty.
    """

    method: str
    budget_ms: float
    predicted_ms: float
    damage: float
    bound: float | None = None
    evaluations: int = 0
    note: str = ""
    table_error: float | None = None

    @property
    def gap(self) -> float | None:
        """Proven relative distance to the optimum, ``(damage - bound) / damage``; None without a bound."""
        if self.bound is None:
            return None
        return 0.0 if self.damage <= 0 else max(0.0, (self.damage - self.bound) / self.damage)


@dataclass(frozen=True)
class Allocation:
    """The width of every group.

    Attributes:
        widths: Group name to units kept; all groups, frozen ones at full size.
        certificate: What is known about how good it is.
    """

    widths: dict[str, int]
    certificate: Certificate


class Ready(Protocol):
    """A problem that was made ready for any number of budgets."""

    def within(self, budget_ms: float) -> Allocation:
        """As `Allocator.allocate`, for one budget in milliseconds."""

    def front(self, budgets_ms: Sequence[float] | int) -> list[Allocation]:
        """One allocation per budget; a number stands for so many, evenly from the smallest reachable latency to the dense one.

        Raises:
            BudgetInfeasibleError: A budget is out of reach.
        """


class Allocator(ABC):
    """Chooses widths: least damage within a latency budget.

    What `edgeprune.testing.allocation` proves of every subclass: the budget holds by the cost model, rules hold, dense
    widths come back when they fit the budget, an impossible budget raises with the smallest latency that was found.
    """

    name: ClassVar[str]
    keeps_limits: ClassVar[bool] = False
    """Whether budgets besides the latency can hold at the same time."""

    @abstractmethod
    def allocate(
        self, groups: Sequence[ChannelGroup], damage: Damage, cost: Cost, budget_ms: float, rules: Rules | None = None
    ) -> Allocation:
        """Choose widths.

        Args:
            groups: All channel groups of the model.
            damage: Damage curve of each group that is not frozen.
            cost: Latency by widths.
            budget_ms: Upper bound of the latency, milliseconds.
            rules: What widths must respect, by group name.

        Raises:
            BudgetInfeasibleError: No widths that were found meet the budget.
            ConstraintError: Rules contradict each other.
        """

    def prepare(
        self,
        groups: Sequence[ChannelGroup],
        damage: Damage,
        cost: Cost,
        rules: Rules | None = None,
        limits: Sequence[Limit] = (),
    ) -> Ready:
        """The same problem for any number of budgets; what does not depend on the budget is done once, where it can be.

        Args:
            groups: All channel groups of the model.
            damage: Damage curve of each group that is not frozen.
            cost: Latency by widths.
            rules: What widths must respect, by group name.
            limits: Further budgets, which hold at the same time.

        Raises:
            ConfigError: There are limits, and this allocator knows latency only.
        """
        self.require_limits(limits)
        return _OneByOne(lambda budget_ms: self.allocate(groups, damage, cost, budget_ms, rules), cost.ms({}))

    def require_limits(self, limits: Sequence[Limit]) -> None:
        """Refuse limits where this allocator knows latency only.

        Raises:
            ConfigError: It does, and there are some.
        """
        if limits and not self.keeps_limits:
            raise ConfigError(
                f"an allocator must be exact to keep a budget of {limits[0].name}, found {self.name}.",
                hint="--allocator exact",
            )


class _OneByOne:
    """Every budget is a problem of its own."""

    def __init__(self, allocate: Callable[[float], Allocation], dense_ms: float) -> None:
        self.within, self._dense_ms = allocate, dense_ms

    def front(self, budgets_ms: Sequence[float] | int) -> list[Allocation]:
        every: Sequence[float]
        if isinstance(budgets_ms, int):
            try:
                least_ms = self.within(0.0).certificate.predicted_ms
            except BudgetInfeasibleError as error:
                least_ms = error.best_ms * (1 + 1e-9)
            every = np.linspace(least_ms, self._dense_ms, budgets_ms).tolist()
        else:
            every = budgets_ms
        return [self.within(budget_ms) for budget_ms in every]


def unproven(
    method: str,
    widths: dict[str, int],
    *,
    budget_ms: float,
    predicted_ms: float,
    damage: float,
    evaluations: int,
    note: str,
) -> Allocation:
    """The result of a search that proves nothing, but for this: damage is never negative, so none is the least."""
    bound = 0.0 if damage == 0 else None
    certificate = Certificate(method, budget_ms, predicted_ms, damage, bound, evaluations, note)
    return Allocation(widths, certificate)


def first_fitting(plans: Sequence[dict[str, int]], cost: Cost, budget_ms: float) -> tuple[dict[str, int], float, int]:
    """The first plan whose latency meets the budget, its latency in milliseconds, and how many were looked up.

    Raises:
        BudgetInfeasibleError: None does.
    """
    seen: list[tuple[float, dict[str, int]]] = []
    for start in range(0, len(plans), _AT_ONCE):
        some = plans[start : start + _AT_ONCE]
        for widths, latency in zip(some, cost.many_ms(some), strict=True):
            seen.append((float(latency), widths))
            if latency <= budget_ms:
                return widths, float(latency), len(seen)
    best_ms, widths = min(seen, key=lambda pair: pair[0])
    raise infeasible(cost, widths, best_ms, budget_ms)


def infeasible(cost: Cost, widths: Widths, best_ms: float, budget_ms: float) -> BudgetInfeasibleError:
    """The error for a budget below what can be reached.

    Args:
        cost: The cost model; one that can explain itself is asked what holds the latency up.
        widths: The widths with the smallest latency that was found.
        best_ms: That latency, milliseconds.
        budget_ms: What was asked for, milliseconds.
    """
    reason = f" ({cost.held_by(widths)})" if isinstance(cost, ExplainsFloor) else ""
    return BudgetInfeasibleError(
        f"latency must be <= {budget_ms:.4g} ms, the smallest plan found reaches {best_ms:.4g} ms{reason}.",
        best_ms=best_ms,
        widths=widths,
        hint=f"--latency {rounded_up_ms(best_ms)}ms",
    )


def rounded_up_ms(value_ms: float) -> str:
    """A latency as a short number that is not below it: three significant digits, rounded up."""
    if value_ms <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value_ms)) - 2)
    return f"{math.ceil(value_ms / step - 1e-9) * step:.6g}"
