"""What layers cost by kept tiles."""

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.allocation.tiles.costs import flops, layer_tokens, measured, modelled_power, published_power
from edgeprune.criteria.tiles.curves import TileCurve
from edgeprune.errors import ConfigError, ModelError
from edgeprune.surgery.tiles import TileGrid


@pytest.fixture
def curve():
    """Tiles of 6, 4, 3 and 2 weights; the smallest go first."""
    grid = TileGrid("proj.weight", (0, 2, 3), (0, 3, 5))
    return TileCurve(grid, np.array([3, 2, 1, 0]), np.zeros(5), np.zeros(5))


def test_operations_count_the_weights_of_the_tiles_that_stay(curve):
    weights = np.array([0, 6, 10, 13, 15])
    np.testing.assert_array_equal(flops(curve, 7), 7 * (2 * weights + 3))
    np.testing.assert_array_equal(flops(curve, 7, outputs=False), 14 * weights)


def test_modelled_power_counts_kept_tiles_and_tiles_of_tokens(curve):
    np.testing.assert_array_equal(modelled_power(curve, 33, energy=0.5), np.arange(5) * 3 * 0.5)
    # As published: tiles that are gone, and the input's size.
    np.testing.assert_array_equal(published_power(curve, 33), np.arange(5)[::-1] * 2)


def test_measured_figures_are_joined_by_straight_lines(curve):
    np.testing.assert_allclose(measured(curve, {4: 2.0, 2: 1.6, 1: 1.7}), [1.7, 1.7, 1.6, 1.8, 2.0])
    with pytest.raises(ConfigError, match=r"at 0..4 kept tiles and at all 4, found \[2\]"):
        measured(curve, {2: 1.0})
    with pytest.raises(ConfigError, match=r"must be finite and at least 0, found others for 'proj.weight'"):
        measured(curve, {4: float("nan")})


def test_tokens_are_counted_by_running_the_model():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head, self.idle = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, tokens):
            return self.head(self.shared(self.shared(tokens)).mean(1))

    model = Twice().train()
    inputs = torch.zeros(3, 5, 4)
    assert layer_tokens(model, inputs, dict.fromkeys(["shared.weight", "head.weight"])) == {
        "shared.weight": 30,
        "head.weight": 3,
    }
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ModelError, match=r"must run on the example inputs, found 'idle.weight' idle"):
        layer_tokens(model, inputs, {"idle.weight": None})
    with pytest.raises(ModelError, match=r"must belong to a module, found none for 'other.weight'"):
        layer_tokens(model, inputs, {"other.weight": None})
