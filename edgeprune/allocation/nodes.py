"""What a table's axis stands for: one decision, two decisions together, or a sum of several in buckets.

A state is one option (an index into the candidate widths) per decision. Every node tells its option at a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.allocation.terms import Floats, Form, Ints


@dataclass(frozen=True)
class Decision:
    """One decision: its options are its candidate widths.

    Attributes:
        index: Which decision.
        count: Number of candidate widths.
    """

    index: int
    count: int

    @property
    def scope(self) -> tuple[int, ...]:
        """The decisions that it depends on."""
        return (self.index,)

    def option(self, states: Ints) -> Ints:
        """Option at each state, shape (states,)."""
        column: Ints = states[:, self.index]
        return column


@dataclass(frozen=True)
class Joint:
    """A value of two decisions (a product, a sum, one while the other is there): one option per value or range of values.

    Nothing is lost by it.

    Attributes:
        first: One decision.
        second: The other.
        option_of: Option by the options of both, shape (first's, second's).
        count: Number of options.
    """

    first: int
    second: int
    option_of: Ints
    count: int

    @property
    def scope(self) -> tuple[int, ...]:
        """The decisions that it depends on."""
        return (self.first, self.second)

    def option(self, states: Ints) -> Ints:
        """Option at each state, shape (states,)."""
        found: Ints = self.option_of[states[:, self.first], states[:, self.second]]
        return found


@dataclass(frozen=True)
class Sum:
    """A value of three or more decisions, in buckets: one option per range of values.

    Attributes:
        addends: (node, value of each of its options): the value is their sum plus the constant.
        constant: Part that never changes.
        lower: Smallest value of each bucket, ascending.
        upper: Largest value of each bucket.
        nodes: All nodes before this one, in which `addends` index.
    """

    addends: tuple[tuple[int, Ints], ...]
    constant: int
    lower: Ints
    upper: Ints
    nodes: tuple[Node, ...]

    @property
    def count(self) -> int:
        """Number of buckets."""
        return len(self.lower)

    @property
    def scope(self) -> tuple[int, ...]:
        """The decisions that it depends on."""
        return tuple(sorted({index for node, _ in self.addends for index in self.nodes[node].scope}))

    def value(self, states: Ints) -> Ints:
        """The sum at each state, shape (states,)."""
        total: Ints = np.full(len(states), self.constant, dtype=np.int64)
        for node, values in self.addends:
            total = total + values[self.nodes[node].option(states)]
        return total

    def option(self, states: Ints) -> Ints:
        """Option at each state, shape (states,)."""
        return np.searchsorted(self.upper, self.value(states), side="left").astype(np.int64)


Node = Decision | Joint | Sum


class Nodes:
    """All nodes of one problem; those of equal forms and buckets are made once.

    Args:
        widths: Candidate widths of each decision, descending.

    Attributes:
        widths: The same, as arrays.
        all: The nodes; node i is decision i for each decision.
    """

    def __init__(self, widths: Sequence[Sequence[int]]) -> None:
        self.widths: list[Ints] = [np.array(some, dtype=np.int64) for some in widths]
        self.all: list[Node] = [Decision(index, len(some)) for index, some in enumerate(self.widths)]
        self._made: dict[tuple[Form, tuple[int, ...]], int] = {}
        self._gated: dict[tuple[int, int], int] = {}

    def values(self, form: Form) -> Ints:
        """Every value that a form can take, ascending (of more than two decisions perhaps some that it cannot)."""
        if len(form.scope) == 2:
            first, second = form.scope
            return np.unique(form.at({first: self.widths[first][:, None], second: self.widths[second][None, :]}))
        total = np.array([form.constant], dtype=np.int64)
        for _, values in self._addends(form):
            total = np.unique(np.add.outer(total, values).ravel())
        return total

    def bucketed(self, form: Form, upper: Ints) -> int:
        """The node of a form whose options are ranges of values.

        Args:
            form: Over at least two decisions.
            upper: Largest value of each range, ascending; the last is the largest value of all.

        Returns:
            Its place in `all`.
        """
        key = (form, tuple(upper.tolist()))
        if key not in self._made:
            scope = form.scope
            if len(scope) == 2:
                self._made[key] = self._add(self._joint(form, scope[0], scope[1], upper))
            else:
                self._made[key] = self._add(self._sum(form, upper))
        return self._made[key]

    def gated(self, decision: int, gate: int) -> int:
        """The node of a decision that only counts while another one is not 0: its options, and a last one for not counting.

        Returns:
            Its place in `all`.
        """
        if (decision, gate) not in self._gated:
            count = len(self.widths[decision])
            own = np.arange(count, dtype=np.int64)[:, None]
            option_of = np.where(self.widths[gate][None, :] == 0, count, own)
            first, second = sorted((decision, gate))
            option_of = option_of if first == decision else option_of.T.copy()
            self._gated[decision, gate] = self._add(Joint(first, second, option_of, count + 1))
        return self._gated[decision, gate]

    def _add(self, node: Node) -> int:
        self.all.append(node)
        return len(self.all) - 1

    def _joint(self, form: Form, first: int, second: int, upper: Ints) -> Joint:
        values = form.at({first: self.widths[first][:, None], second: self.widths[second][None, :]})
        return Joint(first, second, np.searchsorted(upper, values, side="left").astype(np.int64), len(upper))

    def _sum(self, form: Form, upper: Ints) -> Sum:
        addends: list[tuple[int, Ints]] = []
        for indices, values in self._addends(form):
            if len(indices) == 1:
                addends.append((indices[0], values))
            else:
                product = Form(0, ((indices, 1),))
                distinct = self.values(product)
                coefficient = int(values.ravel()[0] // (self.widths[indices[0]][0] * self.widths[indices[1]][0]))
                addends.append((self.bucketed(product, distinct), coefficient * distinct))
        everything = self.values(form)
        starts = np.searchsorted(everything, upper[:-1], side="right")
        lower = np.concatenate([everything[:1], everything[starts]])
        return Sum(tuple(addends), form.constant, lower, upper, tuple(self.all))

    def _addends(self, form: Form) -> list[tuple[tuple[int, ...], Ints]]:
        """(one decision or two, value by their options): a decision's own terms together, each product of two by itself."""
        single: dict[int, Ints] = {}
        products: list[tuple[tuple[int, ...], Ints]] = []
        for indices, coefficient in form.terms:
            distinct = tuple(sorted(set(indices)))
            if len(distinct) == 1:
                value = coefficient * self.widths[distinct[0]] ** len(indices)
                single[distinct[0]] = single.get(distinct[0], np.zeros_like(value)) + value
            else:
                first, second = distinct
                products.append((distinct, coefficient * np.outer(self.widths[first], self.widths[second])))
        return [((index,), value) for index, value in sorted(single.items())] + products


def ranges(columns: Floats, most: int) -> tuple[Ints, bool]:
    """Where to cut consecutive values into ranges: wherever the cost changes, or, if that is too often, at equal changes.

    Args:
        columns: Costs by value, shape (values, anything).
        most: Largest number of ranges.

    Returns:
        Index of the last value of each range, and whether the cost is the same throughout every range.
    """
    last = len(columns) - 1
    change = np.abs(np.diff(columns, axis=0)).sum(axis=1) if last else np.zeros(0)
    steps = np.flatnonzero(change > 1e-12 * max(1e-300, float(np.abs(columns).sum(axis=1).max())))
    if len(steps) < most:
        return np.concatenate([steps, [last]]).astype(np.int64), True
    traveled = np.cumsum(change)
    cuts = np.searchsorted(traveled, traveled[-1] * np.arange(1, most) / most)
    return np.unique(np.concatenate([cuts, [last]])).astype(np.int64), False
