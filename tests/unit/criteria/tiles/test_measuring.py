"""Curves through what was measured."""

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.criteria.tiles.curves import tile_curves
from edgeprune.criteria.tiles.losses import projected_outputs
from edgeprune.criteria.tiles.measuring import measured_curves, through
from edgeprune.criteria.tiles.sums import gradient_sums, over_weights
from edgeprune.errors import ConfigError, TaskError
from edgeprune.tasks.task import Task


@pytest.fixture
def curves(net, batches, grids):
    task = Task.single(train=batches, validation=batches, loss=projected_outputs, metric=lambda *_: 0.0, name="none")
    return tile_curves(gradient_sums(net, grids, task))


def test_curves_pass_through_half_of_the_squared_change(net, batches, curves):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    told = []
    found = measured_curves(
        net, curves, batches, kept=(0.75, 0.5), progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    samples = torch.cat([inputs for inputs, _ in batches])
    for name, curve in found.items():
        assert (curve.order == curves[name].order).all()
        assert curve.estimate[-1] == 0
        assert (np.diff(curve.estimate) <= 1e-15).all()
        assert (curve.damage <= curve.estimate + 1e-15).all()
        changes = []
        for share in (0.75, 0.5):
            count = int(share * curve.tiles)
            weight = net.get_parameter(name)
            whole = weight.detach().clone()
            with torch.no_grad():
                dense = net(samples)
                weight.mul_(torch.from_numpy(over_weights(curve.grid, curve.kept(count))))
                changes.append(float(((net(samples) - dense) ** 2).sum(1).mean()) / 2)
                weight.copy_(whole)
            # More tiles gone are not less damage.
            assert curve.estimate[count] == pytest.approx(max(changes), rel=1e-9)


def test_points_are_joined_by_lines_over_the_estimate_and_go_on_in_proportion():
    estimate = np.array([10.0, 6.0, 3.0, 1.0, 0.0])
    np.testing.assert_allclose(through(estimate, {2: 9.0, 3: 2.0}), [30.0, 18.0, 9.0, 2.0, 0.0])
    # A measured fall counts as none, and so does an estimated one.
    np.testing.assert_allclose(through(estimate, {2: 1.0, 3: 2.0}), [20 / 3, 4.0, 2.0, 2.0, 0.0])
    np.testing.assert_allclose(through(np.array([2.0, 3.0, 0.0]), {1: 6.0}), [6.0, 6.0, 0.0])
    # An estimate that says nothing.
    np.testing.assert_allclose(through(np.zeros(5), {2: 4.0}), [8.0, 6.0, 4.0, 2.0, 0.0])


def test_what_cannot_be_measured_is_told(net, batches, curves):
    with pytest.raises(ConfigError, match=r"at shares of kept tiles in \[0, 1\), found \(1.0,\)"):
        measured_curves(net, curves, batches, kept=(1.0,))
    with pytest.raises(TaskError, match="outputs must be finite for a change to be measured, found NaN or infinity"):
        measured_curves(net, curves, [(torch.full((1, 5), float("nan"), dtype=torch.float64), None)])

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, inputs):
            return {"logits": self.net(inputs)}

    wrapped = {f"net.{name}": curve for name, curve in curves.items()}
    with pytest.raises(TaskError, match=r"outputs must be one tensor of floats, samples first, .* found dict"):
        measured_curves(Two(), wrapped, batches)
