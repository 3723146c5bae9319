"""Blocks go whole, the one that is missed least first, and nothing else changes."""

from dataclasses import dataclass

import numpy as np
import pytest

from edgeprune.allocation.blockdrop import BlockDrop
from edgeprune.allocation.exact import Exact
from edgeprune.allocation.greedy import Greedy
from edgeprune.allocation.knapsack import Knapsack
from edgeprune.allocation.uniform import Uniform
from edgeprune.errors import BudgetInfeasibleError, ConfigError
from edgeprune.graph.channel_graph import ChannelGroup
from edgeprune.surgery.constraints import WidthRule

SIZES = {"one": 16, "two": 16, "three": 16, "outer": 16}
WORK_MS = {"one": 1.0, "two": 2.0, "three": 0.5, "outer": 1.0}
LOSS = {"one": 0.3, "two": 0.2, "three": 0.9}
RULES = {name: WidthRule(removable=name in LOSS) for name in SIZES}


@dataclass(frozen=True)
class BlockCost:
    """Layers as wide as a vector: narrower ones take as long."""

    def ms(self, widths):
        return float(sum(work for name, work in WORK_MS.items() if widths.get(name, SIZES[name]) > 0))

    def many_ms(self, many):
        return np.array([self.ms(widths) for widths in many])

    def candidates(self, group):
        return (SIZES[group],)


GROUPS = tuple(ChannelGroup(name=name, size=size, unit="channel", members=(), nodes=()) for name, size in SIZES.items())
DAMAGE = {name: np.linspace(LOSS.get(name, 5.0), 0.0, size + 1) for name, size in SIZES.items()}


def allocated(allocator, budget_ms, rules=RULES):
    found = allocator.allocate(GROUPS, DAMAGE, BlockCost(), budget_ms, rules)
    assert BlockCost().ms(found.widths) <= budget_ms
    return found


@pytest.mark.parametrize(
    ("budget_ms", "gone"),
    [(4.5, []), (4.0, ["two"]), (2.5, ["two"]), (1.9, ["one", "two"]), (1.0, ["one", "three", "two"])],
)
def test_blocks_go_in_the_order_of_their_damage_until_the_budget_is_met(budget_ms, gone):
    found = allocated(BlockDrop(), budget_ms)
    assert sorted(name for name, width in found.widths.items() if width == 0) == gone
    assert all(width in (0, SIZES[name]) for name, width in found.widths.items())
    assert found.certificate.damage == pytest.approx(sum(LOSS[name] for name in gone))
    assert found.certificate.bound == (0.0 if not gone else None)


def test_what_is_left_of_all_blocks_gone_is_the_floor():
    with pytest.raises(BudgetInfeasibleError) as caught:
        allocated(BlockDrop(), 0.9)
    assert caught.value.best_ms == 1.0


@pytest.mark.parametrize("allocator", [Exact(), Greedy(), Knapsack()])
def test_the_others_remove_blocks_too_and_the_exact_one_the_best(allocator):
    """For 3.6 ms the block with most damage per millisecond is enough, where the order of damages takes a larger one."""
    found = allocated(allocator, 3.5)
    gone = {name for name, width in found.widths.items() if width == 0}
    assert gone <= set(LOSS)
    if isinstance(allocator, Exact):
        assert gone == {"two"}
        assert found.certificate.damage == pytest.approx(0.2)
    exact = allocated(allocator, 1.5)
    assert {name for name, width in exact.widths.items() if width == 0} >= {"one", "two"}


def test_nothing_is_removed_that_the_rules_do_not_allow():
    with pytest.raises(ConfigError, match="found none that may go"):
        allocated(BlockDrop(), 4.0, {name: WidthRule() for name in SIZES})
    with pytest.raises(BudgetInfeasibleError):
        allocated(Exact(), 4.0, {name: WidthRule() for name in SIZES})
    with pytest.raises(BudgetInfeasibleError):
        allocated(Uniform(), 4.0)
