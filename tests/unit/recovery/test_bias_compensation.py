"""Biases that take over what removed channels gave on average."""

import copy

import pytest
import torch
from torch import nn

from edgeprune.errors import ConfigError
from edgeprune.graph.tracing import trace
from edgeprune.recovery.bias_compensation import compensate_biases
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import make_plan

GONE = (1, 4, 5)


def net(*, norm_behind: bool, padding: int = 0) -> nn.Sequential:
    """Channels that are to go are constant: their batch norm scales them by 0."""
    torch.manual_seed(0)
    behind = [nn.Conv2d(8, 6, 3, padding=padding, bias=not norm_behind), *([nn.BatchNorm2d(6)] if norm_behind else [])]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *behind, nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    with torch.no_grad():
        nn.init.uniform_(model[1].weight, 0.5, 1.5)
        nn.init.uniform_(model[1].bias, 0.5, 1.5)
        model[1].weight[list(GONE)] = 0.0
        for _ in range(50):
            model(torch.randn(16, 3, 10, 10))
    return model.eval()


def cut(model):
    graph = trace(model, torch.zeros(2, 3, 10, 10))
    kept = tuple(unit for unit in range(8) if unit not in GONE)
    plan = make_plan(graph, {next(group.name for group in graph.groups if group.size == 8): kept})
    return graph, plan, apply(model, plan)


def data(count=4):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 10, 10, generator=generator), None) for _ in range(count)]


def far(one, two):
    with torch.no_grad():
        return max(float((one(x) - two(x)).abs().max()) for x, _ in data(2))


def test_removed_constants_leave_no_trace():
    model = net(norm_behind=False)
    graph, plan, module = cut(model)
    before = copy.deepcopy(module.state_dict())
    assert far(module, model) > 0.1
    # Statistics that are estimated anew would differ a little from those of the dense model, which are a moving average.
    statistics = {name: value.clone() for name, value in module.named_buffers()}
    record = compensate_biases(module, graph, plan, torch.zeros(2, 3, 10, 10), data())
    module.load_state_dict(statistics, strict=False)
    assert record.step == "bias_compensation"
    assert record.details["layers"] == 2
    assert record.details["after"] < record.details["before"]
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {"3.bias", "5.bias"}
    # What the batches' own statistics move is little beside what was removed.
    assert far(module, model) < 0.1


@pytest.mark.parametrize("padding", [0, 1])
def test_the_mean_output_is_that_of_the_dense_model(padding):
    model = net(norm_behind=False, padding=padding)
    graph, plan, module = cut(model)
    record = compensate_biases(module, graph, plan, torch.zeros(2, 3, 10, 10), data(3), samples=48)
    with torch.no_grad():
        x = torch.cat([x for x, _ in data(3)])
        means = [one[:4](x).mean((0, 2, 3)) for one in (model, module)]
        torch.testing.assert_close(means[1], means[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(module(x).mean((0, 2, 3)), model(x).mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    assert record.details["samples"] == 48


def test_behind_a_layer_a_batch_norm_takes_it_up_and_weights_stay():
    model = net(norm_behind=True)
    graph, plan, module = cut(model)
    weights = {name: value.clone() for name, value in module.state_dict().items() if name.endswith("weight")}
    wrong = far(module, model)
    compensate_biases(module, graph, plan, torch.zeros(2, 3, 10, 10), data())
    assert far(module, model) < 0.5 * wrong
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in weights.items())
    with torch.no_grad():
        seen = torch.cat([module[:4](x) for x, _ in data()]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(module[4].running_mean, seen.mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(module[4].running_var, seen.var(1), atol=1e-4, rtol=1e-4)


def test_without_samples_there_is_no_mean():
    model = net(norm_behind=False)
    graph, plan, module = cut(model)
    with pytest.raises(ConfigError, match="at least 1 sample, found 0"):
        compensate_biases(module, graph, plan, torch.zeros(2, 3, 10, 10), data(), samples=0)
