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


def test_a_copy_that_cannot_run_in_train_form_is_not_taken_on_trust(monkeypatch):
    def body(net, x):
        return x.relu() * torch.ones(8, 1, 1) if net.training else x.relu()

    draws = _watched(monkeypatch)
    net = _Net(body).eval()
    sample = torch.randn(2, 3, 8, 8)
    plan = edgeprune.uniform_plan(edgeprune.trace(net, sample), ratio=0.5)
    assert type(edgeprune.apply(net, plan)) is not _Net
    assert draws
