"""Masks that let units come back: what they compute, and the gradient that passes them."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import TaskError
from edgeprune.graph.tracing import trace
from edgeprune.recovery.straight_through import StraightThroughMasks
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.masking import randomize
from edgeprune.surgery.plan import make_plan, uniform_plan


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_bn = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.second, self.second_bn = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem_bn(self.stem(x)).relu()
        inner = self.depthwise(self.first_bn(self.first(x)).relu())
        return self.head((x + self.second_bn(self.second(inner))).relu().mean((2, 3)))


class Attention(nn.Module):
    """Its head dimensions are read by a product, not by weights."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)

    def forward(self, x):
        parts = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


KEPT = {"stem (+1 layer)": (0, 2, 3, 6, 7), "first": (1, 2, 5)}


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Residual()
    for norm in (model.stem_bn, model.first_bn, model.second_bn):
        nn.init.uniform_(norm.bias, 0.1, 0.5)
    graph = trace(model, torch.zeros(1, 3, 6, 6))
    names = {group.name: group.size for group in graph.groups}
    kept = {name: KEPT["first"] if size == 6 else KEPT["stem (+1 layer)"] for name, size in names.items()}
    masks = StraightThroughMasks(model, graph.groups)
    masks.keep(kept)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16, 3, 6, 6, generator=generator)
    targets = torch.randint(0, 4, (16,), generator=generator)
    return model, graph, kept, masks, inputs, targets


def test_without_masks_the_model_computes_what_it_does(case):
    model, _, _, masks, inputs, _ = case
    masks.keep({})
    with torch.no_grad():
        assert torch.equal(masks(inputs), model(inputs))


@pytest.mark.parametrize("training", [False, True])
def test_masked_equals_cut(case, training):
    model, graph, kept, masks, inputs, _ = case
    cut = apply(model, make_plan(graph, kept)).train(training)
    masks.train(training)
    with torch.no_grad():
        assert torch.allclose(masks(inputs), cut(inputs), atol=1e-5)
        dense = model.train(training)(inputs)
    assert not torch.allclose(dense, cut(inputs), atol=1e-2)
    if training:
        # Statistics of kept channels are those of the cut model, and weights are what they were.
        rows = list(kept[next(name for name, units in kept.items() if len(units) == 5)])
        assert not torch.equal(model.second_bn.running_mean, torch.zeros(8))
        assert cut.second_bn.running_mean.shape == (len(rows),)


def test_the_gradient_of_a_masked_weight_is_that_of_the_masked_weight_where_it_is_used(case):
    model, _, kept, masks, inputs, targets = case
    masks.train()
    nn.functional.cross_entropy(masks(inputs), targets).backward()
    # Brute force: the same net with leaves that are already masked; nothing is straight-through about it.
    plain = copy.deepcopy(model).train()
    plain.zero_grad()
    inner = next(units for units in kept.values() if len(units) == 3)
    outer = next(units for units in kept.values() if len(units) == 5)
    gone_inner = [index for index in range(6) if index not in inner]
    gone_outer = [index for index in range(8) if index not in outer]
    with torch.no_grad():
        plain.second.weight[:, gone_inner] = 0
        plain.first.weight[:, gone_outer] = 0
        plain.head.weight[:, gone_outer] = 0
    nn.functional.cross_entropy(plain(inputs), targets).backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name].grad, atol=1e-7), name
    assert model.second.weight.grad[:, gone_inner].abs().max() > 0, "masked readers learn"
    assert float(model.first.weight.grad[gone_inner].abs().max()) == 0, "what nobody reads does not"
    # The derivative by a gate at 0: how the loss changes when a little of the unit is let through.
    derivatives = masks.gate_derivatives()
    name = next(name for name, units in kept.items() if len(units) == 3)
    unit, small = gone_inner[0], 1e-3
    step = small * model.second.weight.detach()[:, unit]

    def loss(sign):
        moved = copy.deepcopy(plain)
        with torch.no_grad():
            moved.second.weight[:, unit] = sign * step
            return float(nn.functional.cross_entropy(moved.double()(inputs.double()), targets))

    assert derivatives[name][unit] == pytest.approx((loss(1) - loss(-1)) / (2 * small), rel=1e-3, abs=1e-6)
    assert np.isfinite(derivatives[name]).all()


@pytest.mark.parametrize("name", ["OptionA", "DenseNet", "Shuffle", "Grouped", "Tied"])
def test_masked_equals_cut_in_coupled_concatenated_grouped_and_tied_layers(name):
    spec = importlib.util.spec_from_file_location("small_nets", Path(__file__).parents[1] / "graph" / "nets.py")
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    torch.manual_seed(0)
    model = getattr(nets, name)().eval()
    randomize(model)
    graph = trace(model, torch.zeros(1, 3, 16, 16))
    plan = uniform_plan(graph, 0.4)
    masks = StraightThroughMasks(model, graph.groups).eval()
    masks.keep({name: group["kept"] for name, group in plan.groups.items()})
    inputs = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(masks(inputs), apply(model, plan)(inputs), atol=1e-5)


def test_units_that_no_weight_reads_are_masked_where_they_are_made(case):
    torch.manual_seed(0)
    model = Attention()
    graph = trace(model, torch.zeros(1, 5, 8))
    (group,) = [group for group in graph.groups if group.unit == "head dimension" and group.name.startswith("query")]
    kept = {group.name: (0, 3)}
    masks = StraightThroughMasks(model, graph.groups)
    masks.keep(kept)
    cut = apply(model, make_plan(graph, kept))
    inputs = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert torch.allclose(masks(inputs), cut(inputs), atol=1e-5)
        assert not torch.allclose(masks(inputs), model(inputs), atol=1e-4)


def test_weights_that_do_not_learn_are_refused(case):
    model, graph, *_ = case
    model.second.weight.requires_grad_(False)
    with pytest.raises(TaskError, match=r"second\.weight must require"):
        StraightThroughMasks(model, graph.groups)
