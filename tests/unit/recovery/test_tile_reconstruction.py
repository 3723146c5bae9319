"""Kept tiles by least squares: against a general solver, and never worse than without."""

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import ConfigError, ModelError, ReconstructionError, TaskError
from edgeprune.recovery.tile_reconstruction import RIDGES, mask_tiles, reconstruct_tiles
from edgeprune.surgery.tiles import TileGrid


class Block(nn.Module):
    """Queries, keys and values of one tensor, and two layers behind them."""

    def __init__(self, *, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8, bias=bias) for _ in range(3))
        self.up, self.down = nn.Linear(8, 20, bias=bias), nn.Linear(20, 8, bias=bias)
        self.forwards = 0

    def forward(self, tokens):
        self.forwards += 1
        read = self.norm(tokens)
        mixed = torch.softmax(self.query(read) @ self.key(read).transpose(1, 2), -1) @ self.value(read)
        tokens = tokens + mixed
        return tokens + self.down(nn.functional.gelu(self.up(tokens)))


NAMES = ("query.weight", "key.weight", "value.weight", "up.weight", "down.weight")


def edges(size, step):
    return (*range(0, size, step), size)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Block().double()


@pytest.fixture
def loader():
    # Tokens that hang together, as real ones do: what is gone can be told from what is left.
    draw = torch.Generator().manual_seed(1)
    mixing = torch.randn(4, 8, dtype=torch.float64, generator=draw)
    return [
        (
            torch.randn(3, 7, 4, dtype=torch.float64, generator=draw) @ mixing
            + 0.3 * torch.randn(3, 7, 8, dtype=torch.float64, generator=draw),
            None,
        )
        for _ in range(12)
    ]


@pytest.fixture
def tiles(model):
    """Half of the tiles, of sizes that do not divide the layers; one block row is empty."""
    random = np.random.default_rng(2)
    found = {}
    for name in NAMES:
        rows, columns = dict(model.named_parameters())[name].shape
        grid = TileGrid(name, edges(rows, 3), edges(columns, 3))
        found[name] = (grid, random.uniform(size=grid.shape) < 0.5)
    found["up.weight"][1][2] = False
    return found


def inputs_of(model, name, batches):
    """All rows that a layer reads."""
    rows = []
    handle = model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda _, given: rows.append(given[0].flatten(0, -2))
    )
    with torch.no_grad():
        for inputs, _ in batches:
            model(inputs)
    handle.remove()
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_each_layer_equals_a_general_least_squares_solver(model, loader, tiles, ridge):
    refitted, fits = reconstruct_tiles(model, tiles, loader, ridge=ridge)
    assert list(fits) == list(NAMES)
    for name in NAMES:
        grid, kept = tiles[name]
        layer, dense = (one.get_submodule(name.removesuffix(".weight")) for one in (refitted, model))
        given, wanted = inputs_of(refitted, name, loader), inputs_of(model, name, loader)
        target = wanted @ dense.weight.detach().numpy().T + dense.bias.detach().numpy()
        count = len(given)
        assert fits[name].rows == count
        pull = np.sqrt(ridge * count * (given**2).mean())
        for row in range(grid.shape[0]):
            columns = np.flatnonzero(np.repeat(kept[row], np.diff(grid.column_edges)))
            for output in range(grid.row_edges[row], grid.row_edges[row + 1]):
                # The pull towards the former weights, as rows of data.
                matrix = np.block(
                    [
                        [given[:, columns], np.ones((count, 1))],
                        [pull * np.eye(len(columns)), np.zeros((len(columns), 1))],
                    ]
                )
                right = np.concatenate([target[:, output], pull * dense.weight.detach().numpy()[output, columns]])
                solution = np.linalg.lstsq(matrix, right, rcond=None)[0]
                found = layer.weight.detach().numpy()[output]
                np.testing.assert_allclose(found[columns], solution[:-1], atol=1e-8)
                assert layer.bias[output].item() == pytest.approx(solution[-1], abs=1e-8)
                assert (np.delete(found, columns) == 0).all()


def test_without_a_bias_there_is_no_intercept(loader, tiles):
    torch.manual_seed(3)
    model = Block(bias=False).double()
    refitted, _ = reconstruct_tiles(model, tiles, loader, ridge=0.0)
    grid, kept = tiles["query.weight"]
    given = inputs_of(model, "query.weight", loader)
    for row in range(grid.shape[0]):
        columns = np.flatnonzero(np.repeat(kept[row], np.diff(grid.column_edges)))
        rows = slice(grid.row_edges[row], grid.row_edges[row + 1])
        solution = np.linalg.lstsq(given[:, columns], given @ model.query.weight.detach().numpy()[rows].T, rcond=None)[
            0
        ]
        np.testing.assert_allclose(refitted.query.weight.detach().numpy()[rows][:, columns], solution.T, atol=1e-8)


def test_the_ridge_is_chosen_by_batches_that_no_fit_sees(model, loader, tiles):
    refitted, fits = reconstruct_tiles(model, tiles, loader)
    assert {fit.rows for fit in fits.values()} == {9 * 3 * 7}
    seen = [batch for place, batch in enumerate(loader) if place % 4 != 3]
    given = {
        ridge: reconstruct_tiles(model, {"query.weight": tiles["query.weight"]}, seen, ridge=ridge)[0]
        for ridge in RIDGES
    }
    held_back = torch.from_numpy(inputs_of(model, "query.weight", loader[3::4]))
    with torch.no_grad():
        target = model.query(held_back)
        errors = {ridge: float(((one.query(held_back) - target) ** 2).sum()) for ridge, one in given.items()}
    best = min(errors, key=errors.get)
    assert fits["query.weight"].ridge == best
    torch.testing.assert_close(refitted.query.weight, given[best].query.weight)


def test_weights_stay_where_no_fit_does_better_on_other_data(model, tiles):
    """All tiles are there, so the weights are right already, and a fit to fewer rows than columns could only move them."""
    draw = torch.Generator().manual_seed(5)
    only = {"down.weight": (tiles["down.weight"][0], np.ones(tiles["down.weight"][0].shape, dtype=bool))}
    loader = [(torch.randn(1, 3, 8, dtype=torch.float64, generator=draw), None) for _ in range(4)]
    refitted, fits = reconstruct_tiles(model, only, loader)
    assert fits["down.weight"].ridge == float("inf")
    assert torch.equal(refitted.down.weight, model.down.weight)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0, 1e6, None])
def test_no_layer_is_worse_than_without(model, loader, tiles, ridge):
    _, fits = reconstruct_tiles(model, tiles, loader, ridge=ridge)
    assert all(0 <= fit.after <= fit.before for fit in fits.values())
    if ridge is None or ridge <= 1e-3:
        assert np.mean([fit.after for fit in fits.values()]) < 0.7 * np.mean([fit.before for fit in fits.values()])


def test_the_whole_model_is_nearer_to_the_dense_one(model, loader, tiles):
    masked, (refitted, _) = mask_tiles(model, tiles), reconstruct_tiles(model, tiles, loader)
    with torch.no_grad():
        errors = [
            sum(float(((one(inputs) - model(inputs)) ** 2).sum()) for inputs, _ in loader) for one in (masked, refitted)
        ]
    assert errors[1] < 0.6 * errors[0]


def test_errors_are_those_of_the_layer_as_it_stands(model, loader, tiles):
    only = {"query.weight": tiles["query.weight"]}
    refitted, fits = reconstruct_tiles(model, only, loader, ridge=1e-3)
    given = torch.from_numpy(inputs_of(model, "query.weight", loader))
    with torch.no_grad():
        target = model.query(given)
        fit = fits["query.weight"]
        for layer, found in ((mask_tiles(model, only).query, fit.before), (refitted.query, fit.after)):
            error = ((layer(given) - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
            assert found == pytest.approx(float(error), rel=1e-9)


def test_layers_that_read_one_tensor_share_a_pass_and_the_dense_model_stays(model, loader, tiles):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = []
    refitted, _ = reconstruct_tiles(
        model, tiles, loader, batches=4, progress=lambda what, done, total: told.append((what, done, total))
    )
    # One look at the order; then per stage, of which there are three, the batches.
    assert model.forwards == 1 + 3 * 4
    assert told == [("reconstructing", done, 5) for done in range(1, 6)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for one in (model, refitted) for module in one.modules())
    assert model.training


def test_all_tiles_kept_leaves_the_weights(model, loader, tiles):
    whole = {name: (grid, np.ones(grid.shape, dtype=bool)) for name, (grid, _) in tiles.items()}
    refitted, fits = reconstruct_tiles(model, whole, loader)
    for name, value in refitted.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-8, rtol=0)
    assert max(fit.after for fit in fits.values()) < 1e-12


def test_inputs_that_hang_together_exactly_have_a_solution_too(model, tiles):
    """Fewer rows than weights, and no ridge: of all weights that fit, the shortest."""
    only = {"down.weight": tiles["down.weight"]}
    draw = torch.Generator().manual_seed(4)
    loader = [(torch.randn(1, 3, 8, dtype=torch.float64, generator=draw), None)]
    refitted, fits = reconstruct_tiles(model, only, loader, ridge=0.0)
    assert fits["down.weight"].after < 1e-9
    assert refitted.down.weight.abs().max() < 100


def test_what_cannot_be_refitted_is_told(model, loader, tiles):
    with pytest.raises(ConfigError, match="a finite ridge of at least 0, found -1"):
        reconstruct_tiles(model, tiles, loader, ridge=-1.0)
    with pytest.raises(TaskError, match="must yield at least one batch, found an empty loader"):
        reconstruct_tiles(model, tiles, [])
    norm = TileGrid("norm.weight", (0, 8), (0, 1))
    with pytest.raises(ModelError, match=r"must cover its shape \(8,\), found \(8, 1\)"):
        reconstruct_tiles(model, {"norm.weight": (norm, np.ones((1, 1), dtype=bool))}, loader)
    with pytest.raises(ReconstructionError, match=r"must be finite to refit it, found others at 'query.weight'"):
        reconstruct_tiles(model, tiles, [(torch.full((1, 2, 8), float("nan"), dtype=torch.float64), None)])

    class Odd(Block):
        def forward(self, tokens):
            return self.up(tokens), self.up(tokens)

    odd = Odd().double()
    with pytest.raises(
        ReconstructionError, match=r"must run once in a forward pass to be refitted, 'up.weight' runs 2 times"
    ):
        reconstruct_tiles(odd, {"up.weight": tiles["up.weight"]}, loader)
    with pytest.raises(ReconstructionError, match=r"'down.weight' runs 0 times"):
        reconstruct_tiles(odd, {"down.weight": tiles["down.weight"]}, loader)
