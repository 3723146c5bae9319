from edgeprune.allocation import registry
from edgeprune.allocation._base import Allocator
from edgeprune.allocation.blockdrop import BlockDrop
from edgeprune.allocation.exact import Exact
from edgeprune.allocation.global_threshold import GlobalThreshold
from edgeprune.allocation.greedy import Greedy
from edgeprune.allocation.knapsack import Knapsack
from edgeprune.allocation.uniform import Uniform
from edgeprune.testing.allocation import AllocatorConformance


class TestExact(AllocatorConformance):
    def allocator(self) -> Allocator:
        return Exact()


class TestGlobalThreshold(AllocatorConformance):
    def allocator(self) -> Allocator:
        return GlobalThreshold()


class TestGreedy(AllocatorConformance):
    def allocator(self) -> Allocator:
        return Greedy()


class TestKnapsack(AllocatorConformance):
    def allocator(self) -> Allocator:
        return Knapsack()


class TestUniform(AllocatorConformance):
    def allocator(self) -> Allocator:
        return Uniform()


def test_every_allocator_of_the_table_has_a_conformance_test():
    """Or, where it changes no widths, tests of its own: `test_blockdrop.py`."""
    assert {cls.name for cls in (BlockDrop, Exact, GlobalThreshold, Greedy, Knapsack, Uniform)} == set(registry.names())
