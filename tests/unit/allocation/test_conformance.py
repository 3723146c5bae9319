from edgeprune.allocation import registry
from edgeprune.allocation._base import Allocator
from edgeprune.allocation.greedy import Greedy
from edgeprune.allocation.uniform import Uniform
from edgeprune.testing.allocation import AllocatorConformance


class TestGreedy(AllocatorConformance):
    def allocator(self) -> Allocator:
        return Greedy()


class TestUniform(AllocatorConformance):
    def allocator(self) -> Allocator:
        return Uniform()


def test_every_allocator_of_the_table_has_a_conformance_test():
    assert {cls.name for cls in (Greedy, Uniform)} == set(registry.names())
