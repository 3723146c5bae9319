"""Each criterion equals its formula, evaluated the slow way: one unit at a time, by name of the layer."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from edgeprune.criteria import registry
from edgeprune.criteria.bn_scale import BnScale
from edgeprune.criteria.random import Random
from edgeprune.criteria.taylor import Taylor
from edgeprune.errors import ConfigError, ModelError, TaskError
from edgeprune.graph.tracing import trace
from edgeprune.tasks.task import Objective, Task
from edgeprune.testing.criteria import small_graph, small_net, small_task

SIZES = {"trunk": 6, "inner": 5, "pointwise": 8, "hidden": 7}


@pytest.fixture(scope="module")
def traced():
    return small_net(), small_graph()


def by_hand(graph, scores):
    """Scores by the names used here: the group that holds the layer's output axis."""
    layers = {
        "trunk": "stem.weight",
        "inner": "inner.weight",
        "pointwise": "pointwise.weight",
        "hidden": "hidden.weight",
    }
    named = {}
    for group in graph.groups:
        for name, layer in layers.items():
            if any(member.parameter == layer and member.axis == 0 for member in group.members):
                named[name] = scores[group.name]
    assert len(graph.groups) == len(named) == len(layers)
    return named


# Written down by hand: the layers that read what a group makes.
READERS = {
    "trunk": ["inner", "pointwise"],
    "inner": ["outer"],
    "pointwise": ["hidden"],
    "hidden": ["head"],
}


@contextmanager
def gated(model, gates):
    """Multiply what the readers of each group read by the group's gates."""

    def hook(gate):
        return lambda module, inputs: (inputs[0] * (gate[:, None, None] if inputs[0].ndim == 4 else gate),)

    handles = [
        model.get_submodule(reader).register_forward_pre_hook(hook(gate))
        for name, gate in gates.items()
        for reader in READERS[name]
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


class Unread(nn.Module):
    """Queries and keys meet in a product without weights: nothing reads their units."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(9, 4)

    def forward(self, inputs):
        images = inputs.flatten(1)[:, :45].reshape(-1, 9, 5)
        return self.head((self.query(images) * self.key(images)).sum(-1))


def test_units_that_no_weight_reads_are_scored_by_the_weights_that_make_them():
    torch.manual_seed(0)
    model, task = Unread(), small_task(batches=1)
    graph = trace(model, torch.zeros(2, 3, 6, 6))
    (group,) = graph.groups
    assert {member.role for member in group.members} == {"output", "vector"}
    ((inputs, targets),) = task.objectives[0].train
    cross_entropy(model(inputs), targets).backward()
    made = sum((p.grad * p).detach().double().sum(1) for p in (model.query.weight, model.key.weight))
    np.testing.assert_allclose(Taylor().score(graph, model, task)[group.name], made.square().numpy(), rtol=1e-3)


def test_taylor_adds_weighted_objectives(traced):
    model, graph = traced
    one, other = small_task(1).objectives[0], small_task(2).objectives[0]
    both = Task(
        (
            Objective("one", one.train, one.validation, one.loss, one.metric),
            Objective("other", other.train, other.validation, other.loss, other.metric, weight=0.25),
        )
    )
    scores = Taylor().score(graph, model, both)
    parts = [Taylor().score(graph, model, small_task(seed)) for seed in (1, 2)]
    for name, values in scores.items():
        np.testing.assert_allclose(values, parts[0][name] + 0.25 * parts[1][name], rtol=1e-9)


def test_taylor_looks_at_no_more_batches_than_it_may(traced):
    model, graph = traced
    limited = Taylor(batches=2).score(graph, model, small_task(batches=5))
    exact = Taylor().score(graph, model, small_task(batches=2))
    assert all(np.array_equal(limited[name], exact[name]) for name in exact)


def test_taylor_foretells_the_effect_of_a_small_change(traced):
    """To first order the loss changes by the root of the score when a unit's activation shrinks."""
    model, graph = traced
    data = small_task(batches=1)
    ((inputs, targets),) = data.objectives[0].train
    found = by_hand(graph, Taylor().score(graph, model, data))
    model.eval()
    with torch.no_grad():
        before = float(cross_entropy(model(inputs).double(), targets))
        for name, size in SIZES.items():
            for unit in range(size):
                gate = torch.ones(size)
                gate[unit] -= 1e-2
                with gated(model, {name: gate}):
                    change = (float(cross_entropy(model(inputs).double(), targets)) - before) / 1e-2
                assert abs(change) == pytest.approx(found[name][unit] ** 0.5, rel=0.05, abs=1e-3)
    model.train()


def test_bn_scale_is_the_sum_of_absolute_scales(traced):
    model, graph = traced
    model.inner_bn.weight.data[2] *= -1
    names = [group.name for group in graph.groups if "hidden" not in group.name]
    found = BnScale().score(graph, model, groups=names)
    parameters = dict(model.named_parameters())
    norms = {"trunk": ["stem_bn", "outer_bn", "depthwise_bn"], "inner": ["inner_bn"], "pointwise": ["pointwise_bn"]}
    by_size = {SIZES[name]: layers for name, layers in norms.items()}
    assert len(found) == 3
    for values in found.values():
        expected = sum(parameters[f"{layer}.weight"].detach().abs() for layer in by_size[len(values)])
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-6)


def test_bn_scale_names_the_groups_without_batch_norm(traced):
    model, graph = traced
    with pytest.raises(ModelError, match="needs a batch norm in every group, found none in hidden"):
        BnScale().score(graph, model)


def test_random_depends_on_seed_and_name_only(traced):
    model, graph = traced
    first, same, other = (Random(seed).score(graph, model) for seed in (1, 1, 2))
    for name, values in first.items():
        assert np.array_equal(values, same[name])
        assert not np.array_equal(values, other[name])
        assert ((values >= 0) & (values < 1)).all()


def test_taylor_refuses_gradients_that_are_not_finite(traced):
    model, graph = traced
    task = Task.single(
        train=[(torch.zeros(2, 3, 6, 6), torch.zeros(2, dtype=torch.long))],
        validation=small_task().objectives[0].validation,
        loss=lambda outputs, targets: (outputs - outputs.detach()).sum().sqrt(),
        metric=small_task().objectives[0].metric,
    )
    with pytest.raises(TaskError, match="gradients must be finite for the taylor criterion"):
        Taylor().score(graph, model, task)


def test_options_and_names_are_checked():
    with pytest.raises(ConfigError, match="at least 1 batch, found batches=0"):
        registry.get("taylor", batches=0)
    with pytest.raises(ConfigError, match=r"criterion must be one of l2, l1, .*taylor, .*random.*found 'l3'"):
        registry.get("l3")
    mine = Random(3)
    assert registry.get(mine) is mine
