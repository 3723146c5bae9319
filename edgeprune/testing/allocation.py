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
        """Latency with one unit in each group, milliseconds: no plan is faster."""
        return self.cost.ms({group.name: 1 for group in self.groups})

    def total_damage(self, widths: Mapping[str, int]) -> float:
        """Sum of the damages at some widths."""
        return float(sum(self.damage[name][width] for name, width in widths.items()))

    def best_damage(self, budget_ms: float) -> float:
        """Least total damage within a budget over all widths, by trying every combination of stair edges."""
        names = list(self.dense)
        # Between two edges the latency is flat and the damage falls with the width, so edges and 1 are all there is.
        options = [sorted({*self.cost.candidates(name), 1}) for name in names]
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
                assert all(1 <= width <= problem.dense[name] for name, width in found.widths.items())

    def test_a_bound_is_a_bound(self) -> None:
        for seed in self.seeds:
            problem = instance(seed, groups=3, largest=16)
            budget_ms = problem.floor_ms + 0.5 * (problem.cost.ms({}) - problem.floor_ms)
            certificate = self.allocator().allocate(problem.groups, problem.damage, problem.cost, budget_ms).certificate
            if certificate.bound is not None:
                assert certificate.bound <= problem.best_damage(budget_ms) + 1e-9

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
