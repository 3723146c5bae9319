"""Conformance suite of allocators, and a cost with stairs to try them on.

::

    class TestMine(AllocatorConformance):
        def allocator(self):
            return Mine()
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeprune.allocation._base import Allocator
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.graph.channel_graph import ChannelGroup
from edgeprune.spec import smallest_width
from edgeprune.surgery.constraints import WidthRule

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StairCost:
    """A chain of layers, each as slow as its padded input times its padded output, plus a fixed part.

    Latency of layer i: ``work_ms[i] * ceil(w[i-1] / vector) * ceil(w[i] / vector)``, in units of vectors.

    Attributes:
        sizes: Group name to size, in order.
        work_ms: One value per layer, milliseconds.
        vector: Channels that cost as much as one.
        fixed_ms: What no width changes, milliseconds.
    """

    sizes: Mapping[str, int]
    work_ms: tuple[float, ...]
    vector: int = 4
    fixed_ms: float = 0.1

    def ms(self, widths: Mapping[str, int]) -> float:
        """Latency, milliseconds."""
        vectors = [1] + [-(-widths.get(name, size) // self.vector) for name, size in self.sizes.items()]
        layers = zip(self.work_ms, vectors, vectors[1:], strict=False)
        return self.fixed_ms + sum(work * before * after for work, before, after in layers)

    def many_ms(self, many: Sequence[Mapping[str, int]]) -> Floats:
        """`ms` of each."""
        return np.array([self.ms(widths) for widths in many])

    def candidates(self, group: str) -> tuple[int, ...]:
        """The stair edges: full size and every multiple of the vector below it."""
        size = self.sizes[group]
        below = range((size - 1) // self.vector * self.vector, 0, -self.vector)
        return (size, *below)


@dataclass(frozen=True)
class Instance:
    """One allocation problem.

    Attributes:
        groups: Channel groups; only names and sizes count.
        damage: Damage curves.
        cost: A staircase.
    """

    groups: tuple[ChannelGroup, ...]
    damage: dict[str, Floats]
    cost: StairCost

    @property
    def dense(self) -> dict[str, int]:
        """Full widths."""
        return {group.name: group.size for group in self.groups}

    @property
    def floor_ms(self) -> float:
        """Latency at the smallest widths, milliseconds: no plan is faster."""
        return self.cost.ms({group.name: smallest_width(group.size) for group in self.groups})

    def total_damage(self, widths: Mapping[str, int]) -> float:
        """Sum of the damages at some widths."""
        return float(sum(self.damage[name][width] for name, width in widths.items()))

    def best_damage(self, budget_ms: float) -> float:
        """Least total damage within a budget over all widths, by trying every combination of stair edges."""
        names = list(self.dense)
        # Between two edges the latency is flat and the damage falls with the width, so edges and the smallest width are all.
        options = []
        for name, size in self.dense.items():
            least = smallest_width(size)
            options.append(sorted({least, *(width for width in self.cost.candidates(name) if width > least)}))
        plans = (dict(zip(names, widths, strict=True)) for widths in itertools.product(*options))
        return min((self.total_damage(plan) for plan in plans if self.cost.ms(plan) <= budget_ms), default=np.inf)


def instance(seed: int, groups: int = 4, largest: int = 24) -> Instance:
    """A random problem; the same seed gives the same."""
    rng = np.random.default_rng(seed)
    sizes = {f"layer{index}": int(rng.integers(5, largest + 1)) for index in range(groups)}
    work = tuple(float(value) for value in rng.uniform(0.02, 0.3, groups))
    damage = {}
    for name, size in sizes.items():
        scores = np.sort(rng.gamma(1.0, rng.uniform(0.2, 2.0), size))
        damage[name] = np.concatenate([[0.0], np.cumsum(scores)])[::-1].copy()
    made = tuple(
        ChannelGroup(name=name, size=size, unit="channel", members=(), nodes=()) for name, size in sizes.items()
    )
    return Instance(made, damage, StairCost(sizes, work))


class AllocatorConformance(ABC):
    """What every allocator must do."""

    seeds = range(8)

    @abstractmethod
    def allocator(self) -> Allocator:
        """The allocator under test."""

    def test_the_budget_holds_by_the_cost_model_and_the_certificate_says_the_same(self) -> None:
        for seed in self.seeds:
            problem = instance(seed)
            for share in (0.9, 0.6, 0.35):
                budget_ms = problem.floor_ms + share * (problem.cost.ms({}) - problem.floor_ms)
                found = self.allocator().allocate(problem.groups, problem.damage, problem.cost, budget_ms)
                assert problem.cost.ms(found.widths) <= budget_ms
                assert found.certificate.predicted_ms == problem.cost.ms(found.widths)
                assert found.certificate.budget_ms == budget_ms
                assert np.isclose(found.certificate.damage, problem.total_damage(found.widths))
                assert set(found.widths) == set(problem.dense)
                for name, width in found.widths.items():
                    assert smallest_width(problem.dense[name]) <= width <= problem.dense[name]

    def test_dense_widths_come_back_when_they_fit_the_budget(self) -> None:
        problem = instance(0)
        found = self.allocator().allocate(problem.groups, problem.damage, problem.cost, problem.cost.ms({}))
        assert found.widths == problem.dense
        assert found.certificate.damage == 0

    def test_rules_hold(self) -> None:
        for seed in self.seeds:
            problem = instance(seed)
            first, second, third, _ = problem.groups
            smallest = max(1, third.size - 4)
            rules = {
                first.name: WidthRule(min_width=1, multiple_of=1, frozen=True, tied_to=None),
                second.name: WidthRule(min_width=1, multiple_of=3, frozen=False, tied_to=None),
                third.name: WidthRule(min_width=smallest, multiple_of=1, frozen=False, tied_to=None),
            }
            low_ms = problem.cost.ms({**problem.dense, second.name: 3, third.name: smallest, "layer3": 1})
            budget_ms = low_ms + 0.5 * (problem.cost.ms({}) - low_ms)
            found = self.allocator().allocate(problem.groups, problem.damage, problem.cost, budget_ms, rules).widths
            assert found[first.name] == first.size
            assert found[second.name] % 3 == 0 or found[second.name] == second.size
            assert found[third.name] >= smallest

    def test_only_an_explicit_rule_allows_less_than_was_profiled(self) -> None:
        size = 64
        group = ChannelGroup(name="layer", size=size, unit="channel", members=(), nodes=())
        damage = {"layer": np.arange(size, -1, -1.0)}
        cost = StairCost({"layer": size}, (0.1,), vector=2, fixed_ms=0.0)
        floor_ms = cost.ms({"layer": smallest_width(size)})
        found = self.allocator().allocate((group,), damage, cost, floor_ms).widths
        assert found == {"layer": smallest_width(size)}
        for rules in (None, {"layer": WidthRule(multiple_of=2)}):
            reached = None
            try:
                self.allocator().allocate((group,), damage, cost, 0.5 * floor_ms, rules)
            except BudgetInfeasibleError as error:
                reached = error.widths
            assert reached == {"layer": smallest_width(size)}
        narrow = self.allocator().allocate((group,), damage, cost, 0.5 * floor_ms, {"layer": WidthRule(min_width=1)})
        assert narrow.widths["layer"] < smallest_width(size)

    def test_tied_groups_get_one_width(self) -> None:
        problem = instance(3)
        names = list(problem.dense)
        size = min(problem.dense.values())
        groups = tuple(
            ChannelGroup(name=group.name, size=size, unit="channel", members=(), nodes=()) for group in problem.groups
        )
        cost = StairCost(dict.fromkeys(names, size), problem.cost.work_ms, vector=2)
        damage = {name: problem.damage[name][-size - 1 :] for name in names}
        rules = {names[2]: WidthRule(min_width=1, multiple_of=1, frozen=False, tied_to=names[0])}
        found = self.allocator().allocate(groups, damage, cost, 0.6 * cost.ms({}), rules).widths
        assert found[names[2]] == found[names[0]]
        assert cost.ms(found) <= 0.6 * cost.ms({})

    def test_an_impossible_budget_says_what_can_be_reached(self) -> None:
        for seed in self.seeds:
            problem = instance(seed)
            error = None
            try:
                self.allocator().allocate(problem.groups, problem.damage, problem.cost, 0.5 * problem.floor_ms)
            except BudgetInfeasibleError as raised:
                error = raised
            assert error is not None
            assert np.isclose(error.best_ms, problem.floor_ms)
            hint = error.hint or ""
            assert hint.startswith("--latency ")
            reachable_ms = float(hint.removeprefix("--latency ").removesuffix("ms"))
            assert problem.floor_ms <= reachable_ms <= 1.02 * problem.floor_ms

    def test_equal_input_gives_equal_widths(self) -> None:
        problem = instance(5)
        budget_ms = 0.6 * problem.cost.ms({})
        found = [
            self.allocator().allocate(problem.groups, problem.damage, problem.cost, budget_ms).widths for _ in range(2)
        ]
        assert found[0] == found[1]

    def test_what_was_made_ready_serves_many_budgets_and_a_front(self) -> None:
        problem = instance(2)
        ready = self.allocator().prepare(problem.groups, problem.damage, problem.cost)
        dense_ms = problem.cost.ms({})
        for share in (0.9, 0.5):
            budget_ms = problem.floor_ms + share * (dense_ms - problem.floor_ms)
            alone = self.allocator().allocate(problem.groups, problem.damage, problem.cost, budget_ms)
            assert np.isclose(ready.within(budget_ms).certificate.damage, alone.certificate.damage)
        front = ready.front(5)
        assert np.allclose([found.certificate.budget_ms for found in front], np.linspace(problem.floor_ms, dense_ms, 5))
        assert all(found.certificate.predicted_ms <= found.certificate.budget_ms for found in front)
        assert front[-1].widths == problem.dense
        asked = [0.7 * dense_ms, 0.9 * dense_ms, 0.7 * dense_ms]
        assert [found.certificate.budget_ms for found in ready.front(asked)] == asked
