"""Tables as a mixed-integer linear program, solved by HiGHS.

One binary per decision and candidate, and per bucket of a sum; one continuous variable per pair of options of two nodes that
share a table, whose margins are the options of both (the local polytope). The relaxation of pairwise tables by these
margins is the standard one for discrete graphical models.

Source: D. Koller, N. Friedman, "Probabilistic Graphical Models", 2009, section 13.5 (the integer program and its relaxation);
Q. Huangfu, J. Hall, "Parallelizing the dual revised simplex method", 2018 (HiGHS), through `scipy.optimize.milp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.allocation.nodes import Joint, Node, Sum
from edgeprune.allocation.solver import solve
from edgeprune.allocation.tables import CostTable
from edgeprune.allocation.terms import Floats, Ints

if TYPE_CHECKING:
    from scipy.sparse import csc_array


@dataclass(frozen=True)
class Solved:
    """What the solver says.

    Attributes:
        state: Option of each decision of the best found, or None.
        bound: No state within the limits has a smaller objective; minus infinity where nothing is known.
        feasible: False where it is proven that no state meets the limits.
        finished: Whether the wanted gap was reached within the time.
        in_blocks: Whether only blocks of decisions were solved, and the bound is the relaxation's.
    """

    state: Ints | None
    bound: float
    feasible: bool
    finished: bool
    in_blocks: bool = False


@dataclass(frozen=True)
class Relaxed:
    """The linear relaxation.

    Attributes:
        bound: No state within the limits has less damage; minus infinity where the time ran out.
        feasible: False where it is proven that no state meets the limits.
        reduced: By variable, by how much the bound rises when the variable is 1; empty where the time ran out.
    """

    bound: float
    feasible: bool
    reduced: Floats


class Program:
    """The linear program of one set of tables; limits and objectives change, the rows do not.

    Args:
        nodes: Decisions first.
        damages: Damage by option, per decision.
        tables: One per cost.
        worst: Further damages by option, per set and decision; the largest of their sums is added to the damage. It is one
            more variable, between 0 and 1, and one row per set.

    Attributes:
        variables: Number of columns.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        damages: Sequence[Floats],
        tables: Sequence[CostTable],
        worst: Sequence[Sequence[Floats]] = (),
    ) -> None:
        self.nodes, self.tables, self.decisions = tuple(nodes), tuple(tables), len(damages)
        pairs = {pair for table in tables for pair in table.pairs}
        pairs |= {(node.first, node.second) for node in self.nodes if isinstance(node, Joint)}
        self.counts = [node.count for node in self.nodes]
        self._start = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self._pair_start: dict[tuple[int, int], int] = {}
        self.variables = int(self._start[-1])
        for first, second in sorted(pairs):
            self._pair_start[first, second] = self.variables
            self.variables += self.counts[first] * self.counts[second]
        self._worst = tuple(worst)
        most = max((sum(float(curve.max(initial=0.0)) for curve in one) for one in worst), default=0.0)
        self._most = most or 1.0
        self._worst_column = self.variables if worst else None
        self.variables += len(worst) > 0
        self.damage = np.zeros(self.variables)
        if worst:
            self.damage[-1] = self._most
        self.damage[: int(self._start[self.decisions])] = np.concatenate([*damages, np.zeros(0)])
        self.costs = [self._cost(table) for table in tables]
        self._integral = np.zeros(self.variables, dtype=np.int64)
        for index, node in enumerate(self.nodes):
            if not isinstance(node, Joint):
                self._integral[self._start[index] : self._start[index + 1]] = 1
        self._rows, self._low, self._high = self._structure()

    def solve(
        self,
        limits: Sequence[float],
        *,
        seconds: float,
        gap: float,
        objective: Floats | None = None,
        offset: float = 0.0,
        fixed: Mapping[int, int] | None = None,
        open_: npt.NDArray[np.bool_] | None = None,
        forbidden: Sequence[Ints] = (),
        scale: float = 1.0,
    ) -> Solved:
        """Minimize an objective within limits.

        Args:
            limits: Upper bound of each cost; infinite ones are left out.
            seconds: Time limit.
            gap: Relative gap at which to stop.
            objective: By variable; the damage when None.
            offset: Added to the objective.
            fixed: Option of decisions that may not change.
            open_: By variable whether it may be other than 0; all when None.
            forbidden: States that may not be returned.
            scale: About the size of the objective, so that absolute tolerances mean what they should.
        """
        from scipy.sparse import csc_array, vstack

        limited, most = self._limited(limits)
        rows, low, high = [self._rows, limited], [self._low, np.full(len(most), -np.inf)], [self._high, most]
        for state in forbidden:
            row = np.zeros(self.variables)
            row[self._start[: self.decisions] + state] = 1.0
            rows.append(csc_array(row[None, :]))
            low.append(np.array([-np.inf]))
            high.append(np.array([self.decisions - 1.0]))
        kept = self._kept(fixed or {})
        kept = kept if open_ is None else kept[open_[kept]]
        found = _milp(
            (self.damage if objective is None else objective)[kept] / scale,
            csc_array(vstack(rows, format="csc"))[:, kept],
            np.concatenate(low),
            np.concatenate(high),
            self._integral[kept],
            seconds,
            gap,
        )
        values = None
        if found.x is not None:
            values = np.zeros(self.variables)
            values[kept] = found.x
        bound = found.mip_dual_bound
        return Solved(
            state=None if values is None else self.state(values),
            bound=-np.inf if bound is None or not np.isfinite(bound) else float(bound) * scale + offset,
            feasible=found.status != 2,
            finished=found.status in (0, 2),
        )

    def relax(self, limits: Sequence[float], *, seconds: float, scale: float = 1.0) -> Relaxed:
        """The bound of the damage without integrality, and what each variable would add to it.

        Args:
            limits: Upper bound of each cost; infinite ones are left out.
            seconds: Time limit.
            scale: About the size of the damage.
        """
        from scipy.optimize import linprog
        from scipy.sparse import csc_array, vstack

        limited, most = self._limited(limits)
        equal = self._low == self._high
        below, above = np.isfinite(self._high) & ~equal, np.isfinite(self._low) & ~equal
        rows = self._rows.tocsr()
        found = linprog(
            self.damage / scale,
            A_ub=csc_array(vstack([rows[below], -rows[above], limited])),
            b_ub=np.concatenate([self._high[below], -self._low[above], most]),
            A_eq=rows[equal],
            b_eq=self._low[equal],
            bounds=(0, 1),
            method="highs-ds",
            options={"time_limit": max(0.01, seconds)},
        )
        if found.status != 0:
            return Relaxed(-np.inf, found.status != 2, np.zeros(0))
        # A variable at its upper bound has a negative one: there is nothing to gain by that.
        reduced = np.maximum(found.lower.marginals, 0.0) * scale
        if self._worst_column is not None:
            reduced[self._worst_column] = 0.0  # it is no option that could be left out
        return Relaxed(float(found.fun) * scale, True, reduced)

    def least(self, cost: int, *, seconds: float) -> Solved:
        """The state with the smallest value of one cost, by the tables, and a bound of it."""
        vector, constant = self.costs[cost]
        unit = max(1e-300, float(np.abs(vector).max(initial=0.0)))
        unlimited = [np.inf] * len(self.costs)
        return self.solve(unlimited, seconds=seconds, gap=1e-6, objective=vector, offset=constant, scale=unit)

    def state(self, values: Floats) -> Ints:
        """The options with the largest values."""
        return np.array(
            [int(np.argmax(values[self._start[index] : self._start[index + 1]])) for index in range(self.decisions)],
            dtype=np.int64,
        )

    def _limited(self, limits: Sequence[float]) -> tuple[csc_array, Floats]:
        """One row per finite limit, scaled to about one."""
        from scipy.sparse import csc_array

        rows, most = [np.zeros((0, self.variables))], []
        for (cost, constant), limit in zip(self.costs, limits, strict=True):
            if np.isfinite(limit):
                unit = max(abs(limit), 1e-12 * float(np.abs(cost).max(initial=1e-300)))
                rows.append(cost[None, :] / unit)
                most.append((limit - constant) / unit)
        return csc_array(np.concatenate(rows)), np.array(most, dtype=np.float64)

    def _cost(self, table: CostTable) -> tuple[Floats, float]:
        vector = np.zeros(self.variables)
        for node, single in table.single.items():
            vector[self._start[node] : self._start[node + 1]] += single
        for pair, values in table.pairs.items():
            start = self._pair_start[pair]
            vector[start : start + values.size] += values.ravel()
        return vector, table.constant

    def _structure(self) -> tuple[csc_array, Floats, Floats]:
        rows = _Rows()
        for index, node in enumerate(self.nodes):
            if not isinstance(node, Joint):
                rows.add(1, np.zeros(node.count, dtype=np.int64), self._columns(index), 1.0, 1.0, 1.0)
            if isinstance(node, Joint):
                self._add_joint(rows, index, node)
            elif isinstance(node, Sum):
                self._add_sum(rows, index, node)
        for one in self._worst:
            columns = np.append(np.arange(self._start[self.decisions]), self.variables - 1)
            values = np.append(np.concatenate([*one, np.zeros(0)]) / self._most, -1.0)
            rows.add(1, np.zeros(len(columns), dtype=np.int64), columns, values, -np.inf, 0.0)
        for (first, second), start in self._pair_start.items():
            for axis, node_index in enumerate((first, second)):
                shape = (self.counts[first], self.counts[second])
                option = np.indices(shape)[axis].ravel()
                count = self.counts[node_index]
                rows.add(
                    count,
                    np.concatenate([option, np.arange(count)]),
                    np.concatenate([start + np.arange(option.size), self._columns(node_index)]),
                    np.concatenate([np.ones(option.size), -np.ones(count)]),
                    0.0,
                    0.0,
                )
        return rows.matrix(self.variables)

    def _add_joint(self, rows: _Rows, index: int, node: Joint) -> None:
        """An option of the node is the sum of the pairs that have its value."""
        start = self._pair_start[node.first, node.second]
        option = node.option_of.ravel()
        rows.add(
            node.count,
            np.concatenate([option, np.arange(node.count)]),
            np.concatenate([start + np.arange(option.size), self._columns(index)]),
            np.concatenate([np.ones(option.size), -np.ones(node.count)]),
            0.0,
            0.0,
        )

    def _add_sum(self, rows: _Rows, index: int, node: Sum) -> None:
        """The value lies in the range of the chosen bucket: two inequalities."""
        columns = np.concatenate([*(self._columns(addend) for addend, _ in node.addends), self._columns(index)])
        values = np.concatenate([values for _, values in node.addends]).astype(np.float64)
        unit = float(max(1, node.upper[-1]))
        for edges, low, high in ((node.lower, 0.0, np.inf), (node.upper, -np.inf, 0.0)):
            numbers = np.concatenate([values, node.constant - edges.astype(np.float64)]) / unit
            rows.add(1, np.zeros(len(columns), dtype=np.int64), columns, numbers, low, high)

    def _columns(self, node: int) -> Ints:
        return np.arange(self._start[node], self._start[node + 1])

    def _kept(self, fixed: Mapping[int, int]) -> Ints:
        """Columns that can still be other than 0 when some decisions are fixed."""
        open_ = np.ones(self.variables, dtype=bool)
        for index, option in fixed.items():
            open_[self._start[index] : self._start[index + 1]] = False
            open_[self._start[index] + option] = True
        for (first, second), start in self._pair_start.items():
            if first in fixed or second in fixed:
                mask = np.logical_and.outer(
                    open_[self._start[first] : self._start[first + 1]],
                    open_[self._start[second] : self._start[second + 1]],
                )
                open_[start : start + mask.size] = mask.ravel()
        return np.flatnonzero(open_)


class _Rows:
    """Rows of a sparse matrix, collected block by block."""

    def __init__(self) -> None:
        self._parts: list[tuple[Ints, Ints, Floats]] = []
        self._low: list[Floats] = []
        self._high: list[Floats] = []
        self._count = 0

    def add(self, count: int, rows: Ints, columns: Ints, values: Floats | float, low: float, high: float) -> None:
        """Append `count` rows; `rows` count from the first of them."""
        self._parts.append((rows + self._count, columns, np.broadcast_to(values, rows.shape).astype(np.float64)))
        self._low.append(np.full(count, low))
        self._high.append(np.full(count, high))
        self._count += count

    def matrix(self, columns: int) -> tuple[csc_array, Floats, Floats]:
        """The matrix with the lower and upper bounds of its rows."""
        from scipy.sparse import coo_array, csc_array

        rows, places, values = (np.concatenate(some) for some in zip(*self._parts, strict=True))
        matrix = csc_array(coo_array((values, (rows, places)), shape=(self._count, columns)))
        return matrix, np.concatenate(self._low), np.concatenate(self._high)


def _milp(
    objective: Floats, rows: csc_array, low: Floats, high: Floats, integral: Floats | Ints, seconds: float, gap: float
) -> Any:
    from scipy.optimize import Bounds, LinearConstraint

    options: dict[str, Any] = {"time_limit": max(0.01, seconds), "mip_rel_gap": gap}
    constraint = LinearConstraint(rows, low, high)
    found = solve(objective, integrality=integral, bounds=Bounds(0, 1), constraints=constraint, options=options)
    if found.status == 4 and found.x is None:
        # Presolve leaves "infeasible or unbounded" open; every variable is bounded, so without it the answer is clear.
        options["presolve"] = False
        found = solve(objective, integrality=integral, bounds=Bounds(0, 1), constraints=constraint, options=options)
    return found
