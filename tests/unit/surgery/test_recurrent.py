"""Recurrent layers: hidden units go from all gates, layers and directions, and from what reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.criteria.readings import value_readings
from edgeprune.errors import SurgeryError
from edgeprune.surgery.cutting import cut_program
from edgeprune.surgery.plan import PruningPlan, make_plan

HIDDEN = 6
X = torch.randn(2, 5, 4)


class Tagger(nn.Module):
    """Words to tags; `spelled` writes the hidden size into forward."""

    def __init__(self, kind: type[nn.RNNBase], spelled: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.steps = kind(8, HIDDEN, batch_first=True, **options)
        self.width = HIDDEN * (2 if options.get("bidirectional") else 1)
        self.spelled = spelled
        self.tag = nn.Linear(self.width, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, last = self.steps(self.norm(self.read(x).mT).mT)
        if self.spelled:
            found = found.reshape(x.shape[0], 5, 2, HIDDEN).reshape(x.shape[0], 5, 2 * HIDDEN)
        last = last[0] if isinstance(last, tuple) else last
        return self.tag(found), last.square().sum(-1)


DEEP = {"num_layers": 2, "bidirectional": True, "dropout": 0.3}
KINDS = {
    "deep lstm": (nn.LSTM, DEEP),
    "deep lstm in a program": (nn.LSTM, {**DEEP, "spelled": True}),
    "gru without biases": (nn.GRU, {"bias": False, "bidirectional": True}),
    "deep rnn of relus": (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_cut_layer_equals_the_masked_one(name: str, tmp_path: Path) -> None:
    kind, options = KINDS[name]
    net = Tagger(kind, **options).eval()
    graph = edgeprune.trace(net, X)
    assert {group.name: group.size for group in graph.groups} == {"read": 8, "steps": HIDDEN}
    plan = make_plan(graph, {"read": (0, 3, 4, 7), "steps": (1, 2, 5)})
    cut = edgeprune.apply(net, plan)
    assert type(cut).__name__ == ("ProgramModule" if options.get("spelled") else "Tagger")
    assert edgeprune.check(net, plan, X) < 1e-12
    program = cut_program(net, plan).eval()
    for one, other in zip(cut(X), program(X), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert cut(torch.randn(7, 5, 4))[0].shape == (7, 5, 3)
    edgeprune.save(cut, tmp_path, plan=plan)
    again = edgeprune.load(tmp_path, model=Tagger(kind, **options)).eval()
    assert torch.equal(again(X)[0], cut(X)[0])


def test_the_layer_itself_has_the_new_sizes_and_trains() -> None:
    net = Tagger(nn.LSTM, **DEEP).eval()
    cut = edgeprune.apply(net, edgeprune.uniform_plan(edgeprune.trace(net, X), 0.5))
    assert isinstance(cut, Tagger)
    assert (cut.steps.input_size, cut.steps.hidden_size) == (4, 3)
    assert cut.steps.weight_ih_l1_reverse.shape == (12, 6)
    optimizer = torch.optim.SGD(cut.train().parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = sum((found - 1).square().mean() for found in cut(X))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in cut.steps.parameters())


def test_dropout_between_layers_of_a_program_follows_its_form() -> None:
    net = Tagger(nn.LSTM, **DEEP, spelled=True).eval()
    cut = edgeprune.apply(net, edgeprune.uniform_plan(edgeprune.trace(net, X), 0.5))
    assert torch.equal(cut(X)[0], cut(X)[0])
    cut.train()
    assert not torch.equal(cut(X)[0], cut(X)[0])


def _swapped_units(kept: dict[str, dict[int, tuple[int, ...]]]) -> None:
    rows = list(kept["steps.weight_hh_l0"][0])
    rows[0], rows[1] = rows[1], rows[0]
    kept["steps.weight_hh_l0"][0] = tuple(rows)


def _one_gate_of_another_unit(kept: dict[str, dict[int, tuple[int, ...]]]) -> None:
    rows = kept["steps.weight_ih_l0"][0]
    kept["steps.weight_ih_l0"][0] = (*rows[:-1], rows[-1] - 1)


def _other_inputs(kept: dict[str, dict[int, tuple[int, ...]]]) -> None:
    kept["steps.weight_ih_l0"][1] = (0, 3, 4, 6)


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        (_swapped_units, ""),
        (_one_gate_of_another_unit, "must lose the rows of all gates"),
        (_other_inputs, "must not read units that the plan removes, found input 6"),
    ],
)
def test_a_wrong_cut_of_a_layer_is_caught(bug: Any, words: str) -> None:
    net = Tagger(nn.LSTM).eval()
    good = make_plan(edgeprune.trace(net, X), {"read": (0, 3, 4, 7), "steps": (1, 2, 5)})
    kept = {name: dict(axes) for name, axes in good.kept.items()}
    bug(kept)
    plan: PruningPlan = dataclasses.replace(good, kept=kept)
    if not words:
        assert edgeprune.check(net, plan, X) > 1e-3
        return
    with pytest.raises(SurgeryError, match=words):
        edgeprune.check(net, plan, X)


def test_what_a_layer_makes_can_be_seen_where_only_another_one_reads_it() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.end = nn.LSTM(4, 6), nn.GRU(6, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.end(self.two(self.one(x)[0])[1][0])

    graph = edgeprune.trace(Stacked().eval(), torch.randn(5, 2, 4))
    found = value_readings(graph, graph.groups)
    assert [(list(reading.units), reading.axis) for reading in found] == [(["two"], 1), (["one"], 2)]


class Tutorial(nn.Module):
    """States that forward makes itself, as tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.num_layers = HIDDEN, 2
        self.steps, self.fc = nn.LSTM(4, HIDDEN, 2, batch_first=True), nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(self.num_layers, x.size(0), self.hidden_size).to(x.device).to(x.dtype)
        cell = x.new_zeros(self.num_layers, x.size(0), self.hidden_size).requires_grad_()
        found, _ = self.steps(x, (hidden, cell.detach()))
        return self.fc(found[:, -1, :])


def test_zeros_that_forward_begins_with_are_as_long_as_what_is_left() -> None:
    net = Tutorial().eval()
    graph = edgeprune.trace(net, X)
    assert graph.widths() == {"steps": HIDDEN}
    plan = edgeprune.uniform_plan(graph, 0.5)
    assert graph.shapes(plan.widths())["zeros"] == (2, 2, 3)
    cut: Any = edgeprune.apply(net, plan)
    assert isinstance(cut, Tutorial)
    assert (cut.hidden_size, cut.num_layers) == (3, 2)
    assert edgeprune.check(net, plan, X) < 1e-12
    assert torch.allclose(cut_program(net, plan).eval()(X), cut(X), atol=1e-6)


class Continued(nn.Module):
    """States that a layer makes, and zeros that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.one, self.two = nn.Linear(4, 6), nn.GRU(4, 6), nn.GRU(4, 6)
        self.end = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.one(x, self.begin(x[:1]))[0]
        nothing = torch.zeros(1, 2, 6)
        second, third = self.two(x, nothing)[0], self.two(x.flip(0), nothing)[0]
        return self.end(first) + third.sum(-1, keepdim=True) + second.sum(-1, keepdim=True)


def test_states_that_a_layer_makes_go_with_the_units_and_shared_zeros_keep_them() -> None:
    net = Continued().eval()
    graph = edgeprune.trace(net, torch.randn(5, 2, 4))
    (group,) = graph.groups
    assert {member.parameter for member in group.members} >= {"begin.weight", "one.weight_hh_l0", "end.weight"}
    assert edgeprune.check(net, edgeprune.uniform_plan(graph, 0.5), torch.randn(5, 2, 4)) < 1e-12
