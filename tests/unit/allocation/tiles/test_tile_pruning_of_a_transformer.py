"""From a trained transformer and its task to kept tiles: the whole way, on images of digits."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import edgeprune
from edgeprune.allocation.tiles.costs import flops, layer_tokens, modelled_power
from edgeprune.allocation.tiles.exact import ExactTiles
from edgeprune.allocation.tiles.problem import TileLayer, TileProblem, least_kept
from edgeprune.allocation.tiles.slope import SlopeSearch
from edgeprune.criteria.tiles.curves import tile_curves
from edgeprune.criteria.tiles.losses import projected_outputs
from edgeprune.criteria.tiles.scores import tile_scores
from edgeprune.criteria.tiles.sums import gradient_sums, weight_sums
from edgeprune.errors import ConfigError
from edgeprune.recovery.tile_reconstruction import mask_tiles, reconstruct_tiles
from edgeprune.surgery.tiles import tile_grids
from edgeprune.tasks.task import Task


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """Sixteen patches of four pixels."""

    def __init__(self, width=32, heads=4, depth=2):
        super().__init__()
        self.embed, self.places = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, patches):
        return self.head(self.norm(self.layers(self.embed(patches) + self.places).mean(1)))


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 4, 2, 4, 2) / 16
    patches = images.permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    return patches[order], torch.tensor(labels)[order]


@pytest.fixture(scope="module")
def trained(digits):
    patches, labels = digits
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=240)
    for step in range(240):
        some = torch.randint(0, 1_200, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(patches[some]), labels[some]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    assert accuracy(model, digits) > 0.85
    return model


@pytest.fixture(scope="module")
def setting(trained, digits):
    patches, labels = digits
    grids = tile_grids(trained, edgeprune.trace(trained, patches[:2]), (8, 8))
    batches = list(zip(patches[:1_024].split(32), labels[:1_024].split(32), strict=True))
    return grids, batches, layer_tokens(trained, patches[:1], grids)


def accuracy(model, digits):
    patches, labels = digits
    with torch.no_grad():
        return float((model(patches[1_200:]).argmax(1) == labels[1_200:]).float().mean())


def change(model, dense, digits):
    """Squared change of the logits on images that neither training nor scoring saw."""
    with torch.no_grad():
        return float(((model(digits[0][1_200:]) - dense(digits[0][1_200:])) ** 2).sum(1).mean())


def problem_of(trained, setting, beta=0.0, dear=None):
    dear = dear or {}
    grids, batches, tokens = setting
    task = Task.single(train=batches, validation=batches, loss=projected_outputs, metric=lambda *_: 0.0, name="none")
    curves = tile_curves(gradient_sums(trained, grids, task, batches=len(batches)))
    return TileProblem(
        {
            name: TileLayer(
                curve,
                flops(curve, tokens[name]),
                modelled_power(curve, tokens[name], energy=dear.get(name, 1.0)),
                least=least_kept(curve),
            )
            for name, curve in curves.items()
        },
        beta=beta,
    )


def tiles_of(setting, kept):
    return {name: (setting[0][name], tiles) for name, tiles in kept.items()}


def test_chosen_tiles_lose_less_than_the_same_share_of_each_layer_by_magnitude(trained, setting, digits):
    problem = problem_of(trained, setting)
    assert {"embed.weight", "layers.0.qkv.weight", "layers.1.fc2.weight"} <= problem.layers.keys()
    assert "head.weight" not in problem.layers
    found = ExactTiles().search(problem, 0.6 * problem.dense)
    assert found.cost <= 0.6 * problem.dense
    assert found.gap <= 1e-3
    assert SlopeSearch().search(problem, 0.6 * problem.dense).objective >= found.objective * (1 - 1e-9)
    magnitudes = tile_scores(weight_sums(trained, setting[0]), "l1")
    uniform = {
        name: scores > np.sort(scores, axis=None)[max(0, int(0.4 * scores.size) - 1)]
        for name, scores in magnitudes.items()
    }
    chosen, rival = (mask_tiles(trained, tiles_of(setting, kept)) for kept in (found.kept, uniform))
    assert change(chosen, trained, digits) < 0.6 * change(rival, trained, digits)
    refitted, _ = reconstruct_tiles(trained, tiles_of(setting, found.kept), setting[1])
    assert change(refitted, trained, digits) < 0.8 * change(chosen, trained, digits)


def test_the_curve_foretells_what_small_cuts_of_one_layer_do_to_the_output(trained, setting, digits):
    problem = problem_of(trained, setting)
    for name in ("layers.0.fc1.weight", "layers.1.fc2.weight"):
        curve = problem.layers[name].curve
        kept = curve.kept_at(0.25)
        masked = mask_tiles(trained, {name: (curve.grid, curve.kept(kept))})
        # Half of the squared change of the output.
        assert 0.3 < change(masked, trained, digits) / (2 * curve.estimate[kept]) < 3.0


def test_the_same_calibration_gives_the_same_plan(trained, setting):
    found = [
        ExactTiles().search(problem_of(trained, setting), 0.5 * problem_of(trained, setting).dense) for _ in range(2)
    ]
    assert found[0].digest == found[1].digest


def test_a_price_on_modelled_power_lowers_it_at_equal_operations(trained, setting):
    powers, plans = [], []
    dear = "layers.0.fc1.weight"
    for beta in (0.0, 1e-3, 2e-3):
        problem = problem_of(trained, setting, beta=beta, dear={dear: 20.0})
        found = ExactTiles().search(problem, 0.6 * problem.dense)
        powers.append(found.power)
        plans.append(found.counts)
        assert found.cost <= 0.6 * problem.dense
    assert powers[0] >= powers[1] >= powers[2]
    assert powers[2] < 0.95 * powers[0]
    assert plans[2][dear] < plans[0][dear]
    assert any(plans[2][name] > plans[0][name] for name in plans[0])


def test_a_model_without_linear_layers_has_no_tiles():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    graph = edgeprune.trace(model, torch.zeros(2, 3, 8, 8))
    with pytest.raises(
        ConfigError, match="a model must have a linear layer besides its classifier to be cut into tiles"
    ):
        tile_grids(model, graph)
