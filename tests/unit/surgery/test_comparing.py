"""The cut copy of a model is compared with the cut program by operations, and by numbers where those do not tell."""

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.surgery.comparing import Beside


class _Net(nn.Module):
    """A user's class whose forward is `body`."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.calls = 0
        self.body = body

    def forward(self, x):
        self.calls += 1
        return self.head(self.body(self, self.norm(self.conv(x))).mean((2, 3)))


def _steered_by_nothing(net, x):
    return x.relu()


def _same_in_another_way(net, x):
    return x.clamp(min=0.0) if x.shape[1] == 8 else (x.abs() + x) / 2


def _scale_of_the_width(net, x):
    return x.relu() / x.shape[1]


def _watched(monkeypatch):
    draws = []
    in_numbers = Beside._agrees_in_numbers
    monkeypatch.setattr(
        Beside, "_agrees_in_numbers", lambda self, change, draw: draws.append(draw) or in_numbers(self, change, draw)
    )
    return draws


@pytest.mark.parametrize(
    ("body", "own_class", "in_numbers"),
    [
        (_steered_by_nothing, True, False),
        (_same_in_another_way, True, True),
        (_scale_of_the_width, False, True),
    ],
)
def test_operations_tell_first_and_numbers_where_they_do_not(monkeypatch, body, own_class, in_numbers):
    draws = _watched(monkeypatch)
    net = _Net(body).eval()
    sample = torch.randn(2, 3, 8, 8)
    plan = edgeprune.uniform_plan(edgeprune.trace(net, sample), ratio=0.5)
    calls = net.calls
    pruned = edgeprune.apply(net, plan)
    assert (type(pruned) is _Net) is own_class
    assert bool(draws) is in_numbers
    assert net.calls == calls, "only copies are run"
    assert not any(tensor.is_meta for tensor in (*pruned.parameters(), *pruned.buffers()))
    assert edgeprune.check(net, plan, sample) < 1e-9
    torch.testing.assert_close(pruned(sample), edgeprune.surgery.cutting.cut_program(net, plan)(sample))


def test_a_copy_that_cannot_run_in_train_form_is_not_returned():
    def body(net, x):
        return x.relu() * torch.ones(8, 1, 1) if net.training else x.relu()

    net = _Net(body).eval()
    sample = torch.randn(2, 3, 8, 8)
    plan = edgeprune.uniform_plan(edgeprune.trace(net, sample), ratio=0.5)
    assert type(edgeprune.apply(net, plan)) is not _Net


def test_a_model_that_does_not_train_on_its_example_inputs_either_comes_back_as_its_own_class(monkeypatch):
    draws = _watched(monkeypatch)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    sample = torch.randn(1, 6)
    pruned = edgeprune.apply(net, edgeprune.uniform_plan(edgeprune.trace(net, sample), ratio=0.5))
    assert type(pruned) is nn.Sequential
    assert not draws
    pruned.train()(torch.randn(4, 6))


class _Attention(nn.Module):
    """Attention with the scale that torch takes from the head dimension, behind layers that make values large or small."""

    def __init__(self, gain, norm):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.deep = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(8))
        self.query, self.key, self.value = (nn.Conv2d(16, 32, 1, bias=False) for _ in range(3))
        # Between the query's weights and its use: so the scale cannot be folded into them.
        self.query_norm, self.key_norm = (nn.BatchNorm2d(32) if norm else nn.Softplus() for _ in range(2))
        self.head = nn.Linear(32, 4)
        for layer in self.deep:
            nn.init.normal_(layer.weight, std=gain)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.deep:
            x = x + layer(x)
        query, key = self.query_norm(self.query(x)), self.key_norm(self.key(x))
        query, key, value = (part.flatten(2).transpose(1, 2)[:, None] for part in (query, key, self.value(x)))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.head(mixed[:, 0].mean(1))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("gain", [1e-3, 0.1, 3.0])
def test_a_scale_that_follows_the_head_dimension_is_seen_however_large_the_scores_are(gain, norm):
    net = _Attention(gain, norm).eval()
    sample = torch.randn(2, 3, 8, 8)
    plan = edgeprune.uniform_plan(edgeprune.trace(net, sample), ratio=0.5)
    assert len(plan.kept["query.weight"][0]) == 16
    assert type(edgeprune.apply(net, plan)) is not _Attention
    assert edgeprune.check(net, plan, sample, relative=True) < 1e-9


def test_buffers_without_memory_of_their_own_are_compared_in_numbers(monkeypatch):
    draws = _watched(monkeypatch)
    net = _Net(_steered_by_nothing).eval()
    net.register_buffer("links", torch.eye(4).to_sparse())
    sample = torch.randn(2, 3, 8, 8)
    plan = edgeprune.uniform_plan(edgeprune.trace(net, sample), ratio=0.5)
    assert type(edgeprune.apply(net, plan)) is _Net
    assert draws


def test_a_table_that_forward_keeps_outside_of_the_model_stays_usable():
    tables = {}

    def body(net, x):
        if x.shape[1] not in tables:
            tables[x.shape[1]] = torch.linspace(0, 1, x.shape[1])
        return x.relu() + tables[x.shape[1]].sum() * 0

    net, sample = _Net(body).eval(), torch.randn(2, 3, 8, 8)
    net(sample)
    plan = edgeprune.uniform_plan(edgeprune.trace(net, sample), ratio=0.5)
    pruned = edgeprune.apply(net, plan)
    assert type(pruned) is _Net
    torch.testing.assert_close(pruned(sample), edgeprune.surgery.cutting.cut_program(net, plan)(sample))
    assert not any(table.is_meta for table in tables.values())


def test_outputs_that_tracing_spoilt_are_not_compared():
    """What `torch.export` leaves in a table that forward keeps outside of the model has no values."""
    tables = {}

    def body(net, x):
        if x.shape[3] not in tables:
            tables[x.shape[3]] = torch.linspace(0, 1, x.shape[3])
        return x.relu() * tables[x.shape[3]]

    net, sample = _Net(body).eval(), torch.randn(2, 3, 8, 8)
    plan = edgeprune.uniform_plan(edgeprune.trace(net, sample), ratio=0.5)
    pruned = edgeprune.apply(net, plan)
    assert type(pruned) is not _Net
    tables.clear()
    torch.testing.assert_close(pruned(sample), edgeprune.surgery.cutting.cut_program(net, plan)(sample))


def test_a_state_that_torch_makes_in_float32_does_not_cost_the_own_class():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.wide, self.head = nn.LSTM(6, 10, batch_first=True), nn.Linear(10, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.wide(self.cells(x)[0]).relu())

    net, sample = Recurrent().eval(), torch.randn(2, 5, 6)
    graph = edgeprune.trace(net, sample)
    assert graph.widths() == {"cells": 10, "wide": 8}
    plan = edgeprune.uniform_plan(graph, ratio=0.5)
    assert type(edgeprune.apply(net, plan)) is Recurrent
    assert edgeprune.check(net, plan, sample) < 1e-9
