import pytest

from edgeprune.criteria import registry
from edgeprune.criteria._base import Criterion
from edgeprune.criteria.activation import ActivationMean, ActivationRms, Apoz
from edgeprune.criteria.bn_scale import BnScale
from edgeprune.criteria.fisher import Fisher
from edgeprune.criteria.geometric_median import GeometricMedian
from edgeprune.criteria.group_norm import GroupNorm
from edgeprune.criteria.l1 import L1
from edgeprune.criteria.l2 import L2
from edgeprune.criteria.lamp import Lamp
from edgeprune.criteria.lasso import Lasso
from edgeprune.criteria.random import Random
from edgeprune.criteria.taylor import Taylor
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.testing.criteria import CriterionConformance


class TestL2(CriterionConformance):
    def criterion(self) -> Criterion:
        return L2()


class TestL1(CriterionConformance):
    def criterion(self) -> Criterion:
        return L1()


class TestGroupNorm(CriterionConformance):
    def criterion(self) -> Criterion:
        return GroupNorm()


class TestGeometricMedian(CriterionConformance):
    def criterion(self) -> Criterion:
        return GeometricMedian()


class TestLamp(CriterionConformance):
    def criterion(self) -> Criterion:
        return Lamp()


class TestBnScale(CriterionConformance):
    def criterion(self) -> Criterion:
        return BnScale()

    def groups(self, graph: ChannelGraph) -> list[str]:
        return [group.name for group in graph.groups if "hidden" not in group.name]


class TestTaylor(CriterionConformance):
    def criterion(self) -> Criterion:
        return Taylor()


class TestFisher(CriterionConformance):
    def criterion(self) -> Criterion:
        return Fisher()


class TestActivationMean(CriterionConformance):
    def criterion(self) -> Criterion:
        return ActivationMean()


class TestActivationRms(CriterionConformance):
    def criterion(self) -> Criterion:
        return ActivationRms()


class TestApoz(CriterionConformance):
    def criterion(self) -> Criterion:
        return Apoz()


class TestLasso(CriterionConformance):
    def criterion(self) -> Criterion:
        return Lasso()


class TestRandom(CriterionConformance):
    def criterion(self) -> Criterion:
        return Random()


@pytest.mark.parametrize("name", registry.CRITERIA.builtin)
def test_every_criterion_of_the_table_has_a_conformance_test(name):
    tested = {cls().criterion().name for cls in CriterionConformance.__subclasses__()}
    assert registry.get(name).name == name
    assert name in tested
