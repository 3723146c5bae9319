"""Tables of a cost that does not state its terms: found by looking it up at planned widths, and tried at random ones.

A cost that tells what each part of the network takes (`TellsParts`) is taken apart part by part. Which decisions a part
depends on is found by changing one at a time; a part that depends on at most two gets a table over their candidates, whose
cells are read off an orthogonal array of states: with q levels, q * q states hold every pair of candidates of *all* pairs of
decisions that meet in some part, whatever their number. A part that depends on more is told by at most two sizes that cover
its shape; one that only a third decision takes out, with the branch that it lies in, gets a table over that and two others. In a
sum of widths (a layer behind a concat) it is taken to be a straight line, one for each width on the other
side; a product (a projection to heads times head dimensions) gets a table over ranges of its values. A part that no two sizes
cover becomes a sum over single decisions. A cost that tells nothing of its parts is taken as one part
(`edgeprune.allocation.relative`).

Nothing of this is assumed to be right: tables are compared with the cost at random states, and the difference is told.

Source: the arrays are those of R. Bose, K. Bush, "Orthogonal arrays of strength two and three", 1952.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from edgeprune.allocation._base import Cost, Widths
from edgeprune.allocation.nodes import Nodes
from edgeprune.allocation.problem import Problem
from edgeprune.allocation.relative import add_relative
from edgeprune.allocation.sampling import color, levels, orthogonal, prime_at_least
from edgeprune.allocation.tables import CostTable
from edgeprune.allocation.terms import Floats, Form, Ints, in_decisions
from edgeprune.graph.forms import SizeForm

BASES = 6
"""Random states at which every decision is changed by itself."""
RANGES = 48
"""Ranges of values of a product of two widths."""
TRIALS = 32
"""Random states at which tables are compared with the cost."""
SAME = 1e-9
"""Relative difference up to which two costs are one."""


@runtime_checkable
class TellsParts(Protocol):
    """A cost that is the sum of what the parts of a network take."""

    def parts_ms(self, many: Sequence[Widths]) -> list[dict[str, float]]:
        """Per widths, what each part takes, milliseconds; a part that does not run may be left out."""

    def forms_of(self, part: str) -> tuple[SizeForm, ...]:
        """The sizes in the shapes of one part; empty where they are not known."""


@dataclass(frozen=True)
class Decomposed:
    """Tables of a cost, and how far they are from it.

    Attributes:
        table: The tables.
        error: Largest relative difference at the random states.
        lookups: States at which the cost was looked up.
    """

    table: CostTable
    error: float
    lookups: int

    @property
    def exact(self) -> bool:
        """Whether no difference was found."""
        return self.error <= SAME


def decompose(problem: Problem, cost: Cost, nodes: Nodes, seed: int = 0) -> Decomposed:
    """Tables of a cost over the decisions of a problem.

    Args:
        problem: Decisions and candidates.
        cost: What to take apart.
        nodes: Of that problem; nodes are added.
        seed: Of the random states.
    """
    return _Decomposition(problem, cost, nodes, seed).run()


class _Decomposition:
    def __init__(self, problem: Problem, cost: Cost, nodes: Nodes, seed: int) -> None:
        self.problem, self.cost, self.nodes = problem, cost, nodes
        self.dice, self.seed = np.random.default_rng(seed), seed
        self.counts = np.array([len(widths) for widths in nodes.widths])
        self.table = CostTable(nodes.all)
        self.lookups = 0
        self.parts: list[str] = []

    def run(self) -> Decomposed:
        scopes = self._scopes()
        narrow = {part: scope for part, scope in scopes.items() if len(scope) <= 2}
        gates = {part: gate for part, scope in scopes.items() if (gate := self._gate(part, scope)) is not None}
        covers = {part: self._cover(part) for part in scopes if part not in narrow and part not in gates}
        self._add_narrow(narrow)
        self._add_gated(gates, scopes)
        if isinstance(self.cost, TellsParts):
            self._add_covered(covers, scopes)
        elif covers:
            counts = self.counts.tolist()
            add_relative(self.table, lambda states: self._look_up(states)[""], counts, scopes[""], self.seed)
        self.table.settle()
        return Decomposed(self.table, self._error(), self.lookups)

    def _look_up(self, states: Ints) -> dict[str, Floats]:
        """What each part takes at each state."""
        many = [self.problem.widths(tuple(int(w) for w in self._widths(state))) for state in states]
        self.lookups += len(many)
        if not isinstance(self.cost, TellsParts):
            return {"": self.cost.many_ms(many)}
        found = self.cost.parts_ms(many)
        names = dict.fromkeys(name for row in found for name in row)
        return {name: np.array([row.get(name, 0.0) for row in found]) for name in names}

    def _widths(self, state: Ints) -> list[int]:
        return [int(widths[option]) for widths, option in zip(self.nodes.widths, state, strict=True)]

    def _random(self, count: int) -> Ints:
        drawn: Ints = (self.dice.random((count, len(self.counts))) * self.counts).astype(np.int64)
        return drawn

    def _scopes(self) -> dict[str, tuple[int, ...]]:
        """The decisions that change what a part takes, found by changing each from several states."""
        bases = self._random(BASES)
        # Dense and smallest widths are where most plans are near in some group.
        bases[0], bases[1] = 0, self.counts - 1
        states, changed = [*bases], [-1] * len(bases)
        for number, base in enumerate(bases):
            for index in self.problem.movable:
                other = base.copy()
                shift = 1 + self.dice.integers(0, self.counts[index] - 1)
                far = self.counts[index] - 1 if base[index] < self.counts[index] / 2 else 0
                other[index] = far if number % 2 else (base[index] + shift) % self.counts[index]
                states.append(other)
                changed.append(index)
        found = self._look_up(np.array(states))
        scopes = {}
        for part, values in found.items():
            scope = set()
            each = len(self.problem.movable)
            for number in range(len(bases)):
                rows = slice(len(bases) + number * each, len(bases) + (number + 1) * each)
                differs = np.abs(values[rows] - values[number]) > SAME * max(1e-12, abs(values[number]))
                scope |= {index for index, one in zip(changed[rows], differs, strict=True) if one}
            scopes[part] = tuple(sorted(scope))
        return scopes

    def _add_narrow(self, scopes: Mapping[str, tuple[int, ...]]) -> None:
        """Parts over at most two decisions: one orthogonal array holds every cell of every table."""
        pairs = {(scope[0], scope[1]) for scope in scopes.values() if len(scope) == 2}
        states = self._every_pair(pairs)
        found = self._look_up(states)
        for part, scope in scopes.items():
            values = found.get(part, np.zeros(len(states)))
            if not scope:
                self.table.constant += float(values[0])
            elif len(scope) == 1:
                self.table.add_single(scope[0], _means([states[:, scope[0]]], values, (int(self.counts[scope[0]]),)))
            else:
                shape = (int(self.counts[scope[0]]), int(self.counts[scope[1]]))
                self.table.add_pair(scope[0], scope[1], _means([states[:, index] for index in scope], values, shape))

    def _gate(self, part: str, scope: tuple[int, ...]) -> int | None:
        """Of the three decisions of a part the one that is in no shape of it: it says whether the part's branch is there."""
        if len(scope) != 3 or not isinstance(self.cost, TellsParts):
            return None
        forms = [in_decisions(form, self.problem.choices, self.problem.movable) for form in self.cost.forms_of(part)]
        shown = {index for form in forms for index in form.scope}
        found = [index for index in scope if self.problem.choices[index].removable and index not in shown]
        return found[0] if len(found) == 1 else None

    def _add_gated(self, gates: Mapping[str, int], scopes: Mapping[str, tuple[int, ...]]) -> None:
        """Parts over two decisions that a third one takes out: their tables are read off states in which nothing is out."""
        if not gates:
            return
        pairs: dict[str, tuple[int, int]] = {}
        for part, gate in gates.items():
            other, inner = (index for index in scopes[part] if index != gate)
            pairs[part] = (other, inner)
        states = self._every_pair(set(pairs.values()))
        for index in set(gates.values()):
            states[:, index] = 0
        found = self._look_up(states)
        for part, gate in gates.items():
            other, inner = pairs[part]
            shape = (int(self.counts[other]), int(self.counts[inner]))
            there = _means([states[:, other], states[:, inner]], found.get(part, np.zeros(len(states))), shape)
            table = np.concatenate([there, np.zeros((shape[0], 1))], axis=1)
            self.table.add_pair(other, self.nodes.gated(inner, gate), table)

    def _every_pair(self, pairs: Collection[tuple[int, int]]) -> Ints:
        """States that hold every pair of candidates of the given pairs of decisions."""
        colors = color(len(self.counts), pairs)
        q = prime_at_least(max(int(self.counts.max(initial=2)), max(colors, default=0)))
        array = orthogonal(q)
        return np.stack([array[:, colors[index]] % self.counts[index] for index in range(len(self.counts))], axis=1)

    def _cover(self, part: str) -> tuple[Form, ...]:
        """At most two of the part's sizes that hold all the decisions of its shapes; empty where there are none."""
        if not isinstance(self.cost, TellsParts):
            return ()
        sizes = [form for form in self.cost.forms_of(part) if all(len(groups) <= 2 for groups, _ in form.terms)]
        forms = {in_decisions(form, self.problem.choices, self.problem.movable) for form in sizes}
        forms = {form for form in forms if form.scope}
        scope = {index for form in forms for index in form.scope}
        if len(scope) <= 2:
            return tuple(Form(0, (((index,), 1),)) for index in sorted(scope))
        sets = [(form,) for form in forms] + list(itertools.combinations(sorted(forms, key=repr), 2))
        fitting = [some for some in sets if {index for form in some for index in form.scope} == scope]
        return min(fitting, key=lambda some: (sum(len(form.scope) for form in some), len(some), repr(some)), default=())

    def _add_covered(self, covers: Mapping[str, tuple[Form, ...]], scopes: Mapping[str, tuple[int, ...]]) -> None:
        """Parts over several decisions: read off states in which sums of widths are spread evenly."""
        if not covers:
            return
        cluster = self._clusters([form for forms in covers.values() for form in forms])
        conflicts = set()
        for forms in covers.values():
            met = {cluster[index] for form in forms for index in form.scope}
            conflicts |= set(itertools.combinations(sorted(met), 2))
        colors = color(len(self.counts), conflicts)
        q = prime_at_least(max(int(self.counts.max(initial=2)), max(colors), 16))
        array = orthogonal(q)
        columns = []
        members = {index: [other for other, head in enumerate(cluster) if head == index] for index in set(cluster)}
        for index, count in enumerate(self.counts):
            level = array[:, colors[cluster[index]]]
            if len(members[cluster[index]]) == 1:
                columns.append(level % count)
            else:
                columns.append(levels(level / (q - 1), int(count), self.dice))
        states = np.stack(columns, axis=1)
        found = self._look_up(states)
        for part, forms in covers.items():
            values = found.get(part, np.zeros(len(states)))
            sums = [form for form in forms if len(form.scope) > 2]
            if not forms:
                self._add_effects(scopes[part], states, values)
            elif len(sums) == 1 and all(len(set(indices)) == 1 for indices, _ in sums[0].terms):
                self._add_lines(sums[0], [form for form in forms if form is not sums[0]], states, values)
            else:
                self._add_ranges(forms, states, values)

    def _clusters(self, forms: Sequence[Form]) -> list[int]:
        """Decisions that are added up in one size move together; per decision the first of those."""
        head = list(range(len(self.counts)))
        for form in forms:
            if len(form.scope) > 2:
                heads = {head[index] for index in form.scope}
                head = [min(heads) if one in heads else one for one in head]
        return head

    def _add_effects(self, scope: Sequence[int], states: Ints, cost: Floats) -> None:
        """A sum over single decisions: what each candidate changes on average."""
        mean = float(cost.mean())
        self.table.constant += mean
        for index in scope:
            effect = _means([states[:, index]], cost, (int(self.counts[index]),)) - mean
            self.table.add_single(index, np.where(np.isnan(effect), 0.0, effect))

    def _add_lines(self, form: Form, others: Sequence[Form], states: Ints, cost: Floats) -> None:
        """A straight line in a sum of widths, one for each option of what is on the other side."""
        size = form.at({index: self.nodes.widths[index][states[:, index]] for index in form.scope}).astype(np.float64)
        place, option = -1, np.zeros(len(states), dtype=np.int64)
        if others:
            place = others[0].scope[0] if len(others[0].scope) == 1 else self._ranged(others[0])[0]
            option = self.nodes.all[place].option(states)
        count = self.nodes.all[place].count if others else 1
        everywhere = np.polynomial.polynomial.polyfit(size, cost, 1)
        lines = np.tile(everywhere, (count, 1))
        for one in range(count):
            rows = option == one
            if len(np.unique(size[rows])) > 1:
                lines[one] = np.polynomial.polynomial.polyfit(size[rows], cost[rows], 1)
        base, slope = lines[:, 0] + lines[:, 1] * form.constant, lines[:, 1]
        if others:
            self.table.add_single(place, base)
        else:
            self.table.constant += float(base[0])
        for indices, coefficient in form.terms:
            width = coefficient * self.nodes.widths[indices[0]] ** len(indices)
            if others:
                self.table.add_pair(indices[0], place, np.outer(width, slope))
            else:
                self.table.add_single(indices[0], width * slope[0])

    def _ranged(self, form: Form) -> tuple[int, Floats]:
        """The node of a form in even ranges of its values, and the middle of each range."""
        every = self.nodes.values(form)
        cuts = np.searchsorted(every, np.linspace(every[0], every[-1], RANGES + 1)[1:])
        upper = np.unique(np.concatenate([every[np.minimum(cuts, len(every) - 1)], every[-1:]]))
        starts = np.concatenate([[0], np.searchsorted(every, upper[:-1], side="right")])
        return self.nodes.bucketed(form, upper), (every[starts] + upper) / 2

    def _add_ranges(self, forms: tuple[Form, ...], states: Ints, cost: Floats) -> None:
        places, options, sizes, centers = [], [], [], []
        for form in forms:
            values = form.at({index: self.nodes.widths[index][states[:, index]] for index in form.scope})
            if len(form.scope) == 1:
                place = form.scope[0]
                center = form.at({place: self.nodes.widths[place]}).astype(np.float64)
            else:
                place, center = self._ranged(form)
            places.append(place)
            options.append(self.nodes.all[place].option(states))
            sizes.append(values.astype(np.float64))
            centers.append(center)
        plane = _Plane(sizes, cost)
        rest = cost - plane.at(*sizes)
        shape = tuple(len(center) for center in centers)
        if len(places) == 1:
            self.table.add_single(
                places[0], plane.at(centers[0]) + _filled(options[0], None, rest, (shape[0], 1))[:, 0]
            )
        else:
            base = plane.at(centers[0][:, None], centers[1][None, :])
            self.table.add_pair(
                places[0], places[1], base + _filled(options[0], options[1], rest, (shape[0], shape[1]))
            )

    def _error(self) -> float:
        """Largest relative difference at random states: half of them of any widths, half of one share with some spread."""
        states = self._random(TRIALS)
        for row in range(TRIALS // 2):
            share = np.full(1, (row + 0.5) / (TRIALS // 2))
            states[row] = [int(levels(share, int(count), self.dice)[0]) for count in self.counts]
        true = np.sum(list(self._look_up(states).values()), axis=0)
        return float(np.abs(self.table.total(states) / true - 1).max())


class _Plane:
    """A cost as ``a + b x``, or ``a + b x + c y + d x y``, by least squares."""

    def __init__(self, sizes: Sequence[Floats], cost: Floats) -> None:
        self.units = [max(1.0, float(np.abs(size).max())) for size in sizes]
        self.weights = np.linalg.lstsq(np.stack(self._terms(*sizes), axis=-1), cost, rcond=None)[0]

    def at(self, *sizes: Floats) -> Floats:
        """The cost at some sizes."""
        return np.asarray(sum(weight * term for weight, term in zip(self.weights, self._terms(*sizes), strict=True)))

    def _terms(self, *sizes: Floats) -> list[Floats]:
        scaled = [size / unit for size, unit in zip(sizes, self.units, strict=True)]
        ones = np.ones(np.broadcast_shapes(*(size.shape for size in scaled)))
        found = [ones, *(ones * size for size in scaled)]
        return [*found, scaled[0] * scaled[1]] if len(scaled) == 2 else found


def _means(options: Sequence[Ints], values: Floats, shape: tuple[int, ...]) -> Floats:
    """Mean of the values in each cell; not a number where there are none."""
    cell = np.ravel_multi_index(tuple(options), shape)
    count = np.bincount(cell, minlength=int(np.prod(shape)))
    total = np.bincount(cell, weights=values, minlength=int(np.prod(shape)))
    with np.errstate(invalid="ignore"):
        return (total / count).reshape(shape)


def _filled(rows: Ints, columns: Ints | None, values: Floats, shape: tuple[int, int]) -> Floats:
    """Means by cell; cells without values between their neighbors along the first axis, 0 in a column without any."""
    means = _means([rows, np.zeros_like(rows) if columns is None else columns], values, shape)
    for column in means.T:
        known = np.flatnonzero(~np.isnan(column))
        column[:] = np.interp(np.arange(len(column)), known, column[known]) if len(known) else 0.0
    return means
