"""Scores and damages of single tiles equal their formulas, evaluated the slow way: whole matrices, one tile at a time."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from edgeprune.criteria.tiles.losses import projected_outputs, squared_outputs
from edgeprune.criteria.tiles.scores import EPSILON, tile_damage, tile_scores
from edgeprune.criteria.tiles.sums import gradient_sums, over_weights, weight_sums
from edgeprune.errors import ConfigError, ModelError, TaskError
from edgeprune.surgery.tiles import TileGrid
from edgeprune.tasks.task import Objective, Task


def gradients(net, batches, name, loss=cross_entropy):
    """The gradient of each batch by plain backward passes."""
    found = []
    for inputs, targets in batches:
        net.zero_grad()
        loss(net(inputs), targets).backward()
        found.append(dict(net.named_parameters())[name].grad.numpy().copy())
    net.zero_grad(set_to_none=True)
    return found


def tiles_of(grid):
    """Row slice and column slice of each tile."""
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            yield (
                (row, column),
                (
                    slice(grid.row_edges[row], grid.row_edges[row + 1]),
                    slice(grid.column_edges[column], grid.column_edges[column + 1]),
                ),
            )


def test_block_taylor_and_magnitude_equal_means_over_each_tile(net, batches, task, grids):
    sums = gradient_sums(net, grids, task)
    taylor, magnitude = tile_scores(sums, "taylor"), tile_scores(weight_sums(net, grids), "l1")
    for name, grid in grids.items():
        weight = dict(net.named_parameters())[name].detach().numpy()
        mean = np.mean(gradients(net, batches, name), axis=0)
        for tile, part in tiles_of(grid):
            assert taylor[name][tile] == pytest.approx(np.abs(weight * mean)[part].mean(), rel=1e-12)
            assert magnitude[name][tile] == pytest.approx(np.abs(weight)[part].mean(), rel=1e-12)


@pytest.mark.parametrize("curvature", ["batches", "mean", "none"])
def test_damage_of_a_tile_equals_the_quadratic_form_with_the_whole_matrix(net, batches, task, grids, curvature):
    sums = gradient_sums(net, grids, task)
    for name, grid in grids.items():
        weight = dict(net.named_parameters())[name].detach().numpy()
        every = np.array(gradients(net, batches, name))
        mean = every.mean(0)
        flat = every.reshape(len(every), -1) if curvature == "batches" else mean.reshape(1, -1)
        fisher = flat.T @ flat / len(flat) + EPSILON * np.eye(weight.size)
        found = tile_damage(sums[name], curvature)
        for tile, part in tiles_of(grid):
            change = np.zeros_like(weight)
            change[part] = -weight[part]
            wanted = ((change * mean) ** 2).mean()
            if curvature != "none":
                wanted += change.ravel() @ fisher @ change.ravel() / 2
            assert found[tile] == pytest.approx(wanted, rel=1e-10)


def test_several_objectives_add_up_with_their_weights(net, batches, grids):
    def objective(name, loss, weight):
        return Objective(name, batches, batches, loss, lambda *_: 0.0, weight=weight)

    tasks = [
        Task((objective("one", cross_entropy, 2.0),)),
        Task((objective("two", squared_outputs, 0.5),)),
        Task((objective("one", cross_entropy, 2.0), objective("two", squared_outputs, 0.5))),
    ]
    one, two, both = (gradient_sums(net, grids, task) for task in tasks)
    for name in grids:
        squares = [(sums[name].gates ** 2).sum(0) for sums in (one, two, both)]
        np.testing.assert_allclose(squares[0] + squares[1], squares[2], rtol=1e-12)
        np.testing.assert_allclose(one[name].mean_gate + two[name].mean_gate, both[name].mean_gate, rtol=1e-12)


def test_scoring_leaves_the_model_as_it_was_and_says_the_same_twice(net, task, grids):
    net[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    net.train()
    dict(net.named_parameters())["0.weight"].requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = gradient_sums(net, grids, task), gradient_sums(net, grids, task)
    for name in grids:
        assert (first[name].gates == second[name].gates).all()
    assert net.training
    assert [parameter.requires_grad for parameter in net.parameters()] == [False, True, True, True]
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_projected_outputs_estimate_the_squared_change_of_the_output(net, grids):
    draw = torch.Generator().manual_seed(3)
    inputs = [torch.randn(8, 5, dtype=torch.float64, generator=draw) for _ in range(400)]
    batches = [(batch, None) for batch in inputs]
    task = Task.single(
        train=batches, validation=batches, loss=projected_outputs, metric=lambda *_: 0.0, name="change of the output"
    )
    sums = gradient_sums(net, grids, task, batches=400)["2.weight"]
    weight = net[2].weight.detach().clone()
    for tile, part in tiles_of(grids["2.weight"]):
        with torch.no_grad():
            dense = torch.cat([net(batch) for batch in inputs])
            net[2].weight[part] = 0
            change = ((torch.cat([net(batch) for batch in inputs]) - dense) ** 2).sum(1).mean()
            net[2].weight.copy_(weight)
        # The last layer is linear in its weights, so the estimate has noise alone: sqrt(2 / 400) is 7 %.
        assert (sums.gates[(slice(None), *tile)] ** 2).sum() == pytest.approx(float(change), rel=0.2)


def test_masks_repeat_each_tile_over_its_weights(grids):
    grid = grids["0.weight"]
    kept = np.array([[True, False, True], [False, False, True], [True, True, False]])
    mask = over_weights(grid, kept)
    for tile, part in tiles_of(grid):
        assert (mask[part] == kept[tile]).all()
    with pytest.raises(
        ConfigError, match=r"kept tiles of '0.weight' must be a bool array of shape \(3, 3\), found int64"
    ):
        over_weights(grid, kept.astype(int))


@pytest.mark.parametrize(
    ("grids_given", "message"),
    [
        ({}, "a model must have linear layers that are cut into tiles, found none"),
        (
            {"9.weight": TileGrid("9.weight", (0, 1), (0, 1))},
            "must be of a parameter of the model, found none named '9.weight'",
        ),
        ({"0.weight": TileGrid("0.weight", (0, 8), (0, 5))}, r"must cover its shape \(7, 5\), found \(8, 5\)"),
    ],
)
def test_grids_that_do_not_fit_the_model_are_refused(net, grids_given, message):
    with pytest.raises(ModelError, match=message):
        weight_sums(net, grids_given)


def test_what_is_not_finite_is_refused_with_its_name(net, batches, task, grids):
    sums = gradient_sums(net, grids, task)
    sums["2.weight"].magnitudes[1, 0] = np.nan
    with pytest.raises(ModelError, match=r"finite and at least 0, found nan at \(1, 0\) of '2.weight'"):
        tile_scores(sums, "l1")

    def exploding(outputs, targets):
        # The root has no slope at 0: the loss is finite, its gradient is not.
        return torch.sqrt(outputs.sum() * 0)

    bad = Task.single(train=batches, validation=batches, loss=exploding, metric=lambda *_: 0.0, name="none")
    with pytest.raises(TaskError, match="gradients must be finite for the damage of tiles, found NaN or infinity in"):
        gradient_sums(net, grids, bad)
    with torch.no_grad():
        net[0].weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"weights must be finite to be scored, found NaN or infinity in '0.weight'"):
        weight_sums(net, grids)


def test_what_cannot_be_scored_is_told(net, batches, task, grids):
    with pytest.raises(TaskError, match="must be made from gradients, found sums of weights alone"):
        tile_scores(weight_sums(net, grids), "damage")
    with pytest.raises(ConfigError, match="must be ranked by l1, taylor or damage, found 'l7'"):
        tile_scores(weight_sums(net, grids), "l7")
    with pytest.raises(ConfigError, match="at least 1 batch, found batches=0"):
        gradient_sums(net, grids, task, batches=0)
    constant = Task.single(
        train=batches, validation=batches, loss=lambda *_: torch.ones(()), metric=lambda *_: 0.0, name="none"
    )
    with pytest.raises(TaskError, match="must be differentiable, found one without a gradient"):
        gradient_sums(net, grids, constant)
    with pytest.raises(TaskError, match="outputs must be one tensor of floats, samples first"):
        projected_outputs({"logits": torch.ones(2, 2)}, None)
