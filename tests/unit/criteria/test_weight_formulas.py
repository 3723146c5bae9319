"""Criteria that look at weights alone equal their formulas, evaluated one unit at a time on slices written down by hand."""

import numpy as np
import pytest
import torch

from edgeprune.criteria.damage import best_units, damage_curves
from edgeprune.criteria.geometric_median import GeometricMedian
from edgeprune.criteria.group_norm import GroupNorm
from edgeprune.criteria.l1 import L1
from edgeprune.criteria.l2 import L2
from edgeprune.criteria.lamp import Lamp


def found(case, criterion):
    return case.by_hand(criterion.score(case.graph, case.model))


def test_l1_is_the_sum_of_absolute_filter_weights(case):
    for hand, values in found(case, L1()).items():
        for unit in range(case.groups[hand].size):
            expected = sum(float(part.abs().sum()) for part in case.slices(case.groups[hand].makers, unit))
            assert values[unit] == pytest.approx(expected, rel=1e-6)


def test_l2_is_the_norm_over_all_coupled_slices(case):
    for hand, values in found(case, L2()).items():
        for unit in range(case.groups[hand].size):
            expected = sum(float(part.square().sum()) for part in case.slices(case.groups[hand].members, unit))
            assert values[unit] == pytest.approx(expected**0.5, rel=1e-6)


def test_group_norm_is_the_mean_square_norm_of_weights_and_scales_by_the_mean_unit(case):
    for hand, values in found(case, GroupNorm()).items():
        group = case.groups[hand]
        weights = [*group.makers, *group.readers, *group.scales]
        squares = np.array(
            [[float(part.square().sum()) for part in case.slices(weights, unit)] for unit in range(group.size)]
        )
        expected = squares.mean(axis=1) / squares.mean(axis=1).mean()
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        assert values.mean() == pytest.approx(1.0)


def test_geometric_median_is_the_sum_of_distances_between_filters(case):
    for hand, values in found(case, GeometricMedian()).items():
        group = case.groups[hand]
        filters = [
            torch.cat([part.flatten() for part in case.slices(group.makers, unit)]) for unit in range(group.size)
        ]
        for unit, own in enumerate(filters):
            assert values[unit] == pytest.approx(sum(float((own - other).norm()) for other in filters), rel=1e-6)


def test_a_filter_amid_the_others_goes_before_a_small_one(small_case):
    """What sets the geometric median apart from a norm."""
    weight = small_case.model.hidden.weight.data
    weight[:] = torch.linspace(1, 7, 7)[:, None]
    values = found(small_case, GeometricMedian())["hidden"]
    assert values.argmin() == 3
    assert found(small_case, L1())["hidden"].argmin() == 0


def test_filters_of_opposite_sign_are_far_apart(small_case):
    weight = small_case.model.hidden.weight.data
    weight[1:] = weight[1]
    weight[0] = -weight[1]
    values = found(small_case, GeometricMedian())["hidden"]
    assert values[0] == pytest.approx(6 * 2 * float(weight[1].double().norm()), rel=1e-6)
    np.testing.assert_allclose(values[1:], values[0] / 6, rtol=1e-6)


def test_lamp_is_the_share_among_those_that_are_not_smaller(case):
    for hand, values in found(case, Lamp()).items():
        group = case.groups[hand]
        squares = [
            sum(float(part.square().sum()) for part in case.slices(group.members, unit)) for unit in range(group.size)
        ]
        for unit, own in enumerate(squares):
            assert values[unit] == pytest.approx(own / sum(other for other in squares if other >= own), rel=1e-6)
        assert values.max() == 1.0


def test_lamp_ranks_like_l2_and_its_products_are_kept_shares(case):
    lamp, norms = found(case, Lamp()), found(case, L2())
    for hand, values in lamp.items():
        squares = norms[hand] ** 2
        for width in range(1, case.groups[hand].size):
            kept = list(best_units(values, width))
            assert kept == list(best_units(norms[hand], width))
            gone = np.setdiff1d(np.arange(len(values)), kept)
            assert np.prod(1 - values[gone]) == pytest.approx(squares[kept].sum() / squares.sum())


def test_lamp_of_equal_and_of_empty_units(small_case):
    with torch.no_grad():
        for parameter in (small_case.model.hidden.weight, small_case.model.head.weight, small_case.model.hidden.bias):
            parameter.fill_(1.0)
    values = found(small_case, Lamp())["hidden"]
    np.testing.assert_allclose(values, 1 / np.arange(1, 8))
    assert best_units(values, 3) == (0, 1, 2)
    with torch.no_grad():
        for parameter in (small_case.model.hidden.weight, small_case.model.head.weight, small_case.model.hidden.bias):
            parameter.zero_()
    assert not found(small_case, Lamp())["hidden"].any()


@pytest.mark.parametrize(
    "criterion", [L1(), L2(), GroupNorm(), GeometricMedian()], ids=lambda criterion: criterion.name
)
def test_scales_of_a_group_do_not_change_its_damage(small_case, criterion):
    """Why these are normalized: twice the weights, or another layer's size, are not twice the loss."""
    before = damage_curves(criterion.score(small_case.graph, small_case.model), criterion.normalization)
    with torch.no_grad():
        for parameter in small_case.model.parameters():
            parameter.mul_(3.0)
    after = damage_curves(criterion.score(small_case.graph, small_case.model), criterion.normalization)
    for name, curve in before.items():
        np.testing.assert_allclose(after[name][1:], curve[1:], rtol=1e-5, atol=1e-9)
