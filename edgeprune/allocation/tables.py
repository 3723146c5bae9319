"""Costs as tables over the options of one or two nodes: what a solver sees of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeprune.allocation.nodes import Node, Nodes, ranges
from edgeprune.allocation.problem import Problem
from edgeprune.allocation.terms import CostTerm, Floats, Form, Ints, in_decisions

MOST_BUCKETS = 48
"""Most ranges into which the values of a form over several decisions are cut."""


@dataclass
class CostTable:
    """One cost: a constant, a table per node and one per pair of nodes; it is their sum.

    Attributes:
        nodes: What the tables' axes stand for; shared by all costs of a problem, decisions first.
        constant: Part that never changes.
        single: Node to cost by option.
        pairs: (node, node) with the smaller first, to cost by the options of both.
        lossless: Whether no table holds one number for several different costs.
    """

    nodes: Sequence[Node]
    constant: float = 0.0
    single: dict[int, Floats] = field(default_factory=dict)
    pairs: dict[tuple[int, int], Floats] = field(default_factory=dict)
    lossless: bool = True

    def add_single(self, node: int, table: Floats) -> None:
        """Add a table over the options of one node."""
        self.single[node] = self.single[node] + table if node in self.single else table.astype(np.float64)

    def add_pair(self, first: int, second: int, table: Floats) -> None:
        """Add a table over the options of two nodes, shape (first's, second's); of one and the same node its diagonal."""
        if first == second:
            self.add_single(first, np.diagonal(table).copy())
            return
        if first > second:
            first, second, table = second, first, table.T
        key = (first, second)
        self.pairs[key] = self.pairs[key] + table if key in self.pairs else table.astype(np.float64)

    def settle(self) -> None:
        """Move out of the pair tables what a table per node can say; tables that say no more than that are dropped."""
        for (first, second), table in list(self.pairs.items()):
            rows, columns = table[:, :1], table[:1, :]
            rest = table - rows - columns + table[0, 0]
            if np.abs(rest).max(initial=0.0) <= 1e-12 * max(1e-300, float(np.abs(table).max(initial=0.0))):
                del self.pairs[first, second]
                self.add_single(first, rows[:, 0])
                self.add_single(second, columns[0] - table[0, 0])

    def total(self, states: Ints) -> Floats:
        """Cost at each state, shape (states,)."""
        options: dict[int, Ints] = {}

        def option(node: int) -> Ints:
            if node not in options:
                options[node] = self.nodes[node].option(states)
            return options[node]

        total = np.full(len(states), self.constant)
        for node, table in self.single.items():
            total += table[option(node)]
        for (first, second), pair in self.pairs.items():
            total += pair[option(first), option(second)]
        return total


def from_terms(
    problem: Problem, nodes: Nodes, costs: Sequence[Sequence[CostTerm]], most_buckets: int = MOST_BUCKETS
) -> list[CostTable]:
    """Tables of costs that state their terms.

    A term over at most two decisions in all becomes a table over their candidates, and a term that is linear in a sum of widths
    is taken apart into its addends: both exact. Of any other form, one over two decisions (a product, a sum) becomes a node
    whose options are its values, tied to both by equalities; one over three or more becomes a node whose options are ranges
    of values, between which its addends must add up. Ranges end wherever a cost changes: exact too. Where those are more
    than `most_buckets`, neighbors share one, at the *lowest* of their costs, so that what is proven with the tables holds
    for the cost itself.

    Args:
        problem: Decisions and candidates.
        nodes: Of that problem; nodes are added.
        costs: The terms of each cost.
        most_buckets: See above.
    """
    tables = [CostTable(nodes.all) for _ in costs]
    wide: list[tuple[CostTable, tuple[Form, ...], Callable[..., Floats]]] = []
    for table, terms in zip(tables, costs, strict=True):
        for term in terms:
            forms = tuple(in_decisions(form, problem.choices, problem.movable) for form in term.forms)
            if not _add_narrow(table, nodes, forms, term.at) and not _add_linear(table, nodes, forms, term.at):
                wide.append((table, forms, term.at))
    uppers = _uppers(nodes, wide, most_buckets)
    for table, forms, at in wide:
        _add_wide(table, nodes, forms, at, uppers)
    for table in tables:
        table.settle()
    return tables


def _add_narrow(table: CostTable, nodes: Nodes, forms: tuple[Form, ...], at: Callable[..., Floats]) -> bool:
    """Add a term over at most two decisions; False where it has more."""
    scope = sorted({index for form in forms for index in form.scope})
    if len(scope) > 2:
        return False
    if not scope:
        table.constant += float(at(*(form.at({}) for form in forms)))
    elif len(scope) == 1:
        widths = {scope[0]: nodes.widths[scope[0]]}
        cost = at(*(form.at(widths) for form in forms))
        table.add_single(scope[0], np.broadcast_to(cost, (len(widths[scope[0]]),)))
    else:
        first, second = scope
        widths = {first: nodes.widths[first][:, None], second: nodes.widths[second][None, :]}
        shape = (len(nodes.widths[first]), len(nodes.widths[second]))
        table.add_pair(first, second, np.broadcast_to(at(*(form.at(widths) for form in forms)), shape))
    return True


def _add_linear(table: CostTable, nodes: Nodes, forms: tuple[Form, ...], at: Callable[..., Floats]) -> bool:
    """Add a term that is linear in a sum, at each width of at most one other decision; False where it is not."""
    sums = [place for place, form in enumerate(forms) if len(form.scope) > 1]
    others = [place for place in _changing(forms) if place not in sums]
    if len(sums) != 1 or any(len(forms[place].scope) > 1 for place in others):
        return False
    form = forms[sums[0]]
    if any(len(set(indices)) > 1 for indices, _ in form.terms):
        return False
    values, cost = _evaluated(nodes, forms, at)
    axis = _changing(forms).index(sums[0])
    rows = np.moveaxis(cost, axis, 0).reshape(len(values[axis]), -1)
    slope = (rows[-1] - rows[0]) / max(1, values[axis][-1] - values[axis][0])
    straight = rows[0] + np.outer(values[axis] - values[axis][0], slope)
    if np.abs(rows - straight).max() > 1e-9 * max(1e-300, float(np.abs(rows).max())):
        return False
    base = rows[0] - slope * (values[axis][0] - form.constant)
    if others:
        table.add_single(forms[others[0]].scope[0], base)
    else:
        table.constant += float(base[0])
    for indices, coefficient in form.terms:
        width = coefficient * nodes.widths[indices[0]] ** len(indices)
        if others:
            table.add_pair(indices[0], forms[others[0]].scope[0], np.outer(width, slope))
        else:
            table.add_single(indices[0], width * slope[0])
    return True


def _changing(forms: tuple[Form, ...]) -> list[int]:
    return [place for place, form in enumerate(forms) if form.scope]


def _evaluated(nodes: Nodes, forms: tuple[Form, ...], at: Callable[..., Floats]) -> tuple[list[Ints], Floats]:
    """Values of the forms that can change (of a lone decision by its options) and the cost over all of them."""
    changing = _changing(forms)
    values = [
        forms[place].at({forms[place].scope[0]: nodes.widths[forms[place].scope[0]]})
        if len(forms[place].scope) == 1
        else nodes.values(forms[place])
        for place in changing
    ]
    arguments = []
    for place, form in enumerate(forms):
        if place not in changing:
            arguments.append(form.at({}))
        elif len(changing) == 1 or place == changing[0]:
            arguments.append(values[0] if len(changing) == 1 else values[0][:, None])
        else:
            arguments.append(values[1][None, :])
    shape = tuple(len(some) for some in values)
    return values, np.broadcast_to(np.asarray(at(*arguments), dtype=np.float64), shape)


def _uppers(
    nodes: Nodes, wide: Sequence[tuple[CostTable, tuple[Form, ...], Callable[..., Floats]]], most_buckets: int
) -> dict[Form, tuple[Ints, Ints, bool]]:
    """Per form that needs a node: its values, the last value of each range, and whether a range has one cost throughout."""
    columns: dict[Form, list[Floats]] = {}
    for _, forms, at in wide:
        _, cost = _evaluated(nodes, forms, at)
        for axis, place in enumerate(_changing(forms)):
            if len(forms[place].scope) > 1:
                columns.setdefault(forms[place], []).append(np.moveaxis(cost, axis, 0).reshape(cost.shape[axis], -1))
    found = {}
    for form, some in columns.items():
        scaled = [part / max(1e-300, float(np.abs(part).max())) for part in some]
        cuts, lossless = ranges(np.concatenate(scaled, axis=1), most_buckets)
        values = nodes.values(form)
        found[form] = (values, values[cuts], lossless)
    return found


def _add_wide(
    table: CostTable,
    nodes: Nodes,
    forms: tuple[Form, ...],
    at: Callable[..., Floats],
    uppers: dict[Form, tuple[Ints, Ints, bool]],
) -> None:
    values, cost = _evaluated(nodes, forms, at)
    ends = []
    for axis, place in enumerate(_changing(forms)):
        form = forms[place]
        if len(form.scope) == 1:
            ends.append(form.scope[0])
            continue
        _, upper, lossless = uppers[form]
        table.lossless &= lossless
        starts = np.concatenate([[0], np.searchsorted(values[axis], upper[:-1], side="right")])
        cost = np.minimum.reduceat(cost, starts, axis=axis)
        ends.append(nodes.bucketed(form, upper))
    if len(ends) == 1:
        table.add_single(ends[0], cost)
    else:
        table.add_pair(ends[0], ends[1], cost)
