from edgeprune.criteria import registry
from edgeprune.criteria._base import Criterion
from edgeprune.criteria.bn_scale import BnScale
from edgeprune.criteria.l2 import L2
from edgeprune.criteria.random import Random
from edgeprune.criteria.taylor import Taylor
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.testing.criteria import CriterionConformance


class TestL2(CriterionConformance):
    def criterion(self) -> Criterion:
        return L2()


class TestTaylor(CriterionConformance):
    def criterion(self) -> Criterion:
        return Taylor()


class TestBnScale(CriterionConformance):
    def criterion(self) -> Criterion:
        return BnScale()

    def groups(self, graph: ChannelGraph) -> list[str]:
        return [group.name for group in graph.groups if "hidden" not in group.name]


class TestRandom(CriterionConformance):
    def criterion(self) -> Criterion:
        return Random()


def test_every_criterion_of_the_table_has_a_conformance_test():
    assert {cls.name for cls in (L2, Taylor, BnScale, Random)} == set(registry.names())
    assert all(registry.get(name).name == name for name in registry.names())
