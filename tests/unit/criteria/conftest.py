"""Two small nets whose coupled slices are written down by hand: the other side of every comparison with a formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.tracing import trace
from edgeprune.tasks.task import Task
from edgeprune.testing.criteria import small_graph, small_net, small_task

HEADS, DIMENSION, TOKENS = 3, 4, 5
WIDTH = HEADS * DIMENSION


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _same(unit: int) -> list[int]:
    return [unit]


def _head(unit: int) -> list[int]:
    return [unit * DIMENSION + d for d in range(DIMENSION)]


def _dimension(unit: int) -> list[int]:
    return [head * DIMENSION + unit for head in range(HEADS)]


def _thrice(of: Callable[[int], list[int]]) -> Callable[[int], list[int]]:
    """Of queries, keys and values, which lie one behind the other."""
    return lambda unit: [part * WIDTH + index for part in range(3) for index in of(unit)]


@dataclass
class Group:
    """One group by hand: (parameter, axis, indices of a unit) by what the parameter does."""

    size: int
    makers: list[tuple[str, int, Callable[[int], list[int]]]]
    readers: list[tuple[str, int, Callable[[int], list[int]]]]
    scales: list[tuple[str, int, Callable[[int], list[int]]]] = field(default_factory=list)
    biases: list[tuple[str, int, Callable[[int], list[int]]]] = field(default_factory=list)

    @property
    def members(self):
        return [*self.makers, *self.readers, *self.scales, *self.biases]


def _channels(names: str, axis: int) -> list[tuple[str, int, Callable[[int], list[int]]]]:
    return [(name, axis, _same) for name in names.split()]


SMALL = {
    "trunk": Group(
        6,
        _channels("stem.weight outer.weight depthwise.weight", 0),
        _channels("inner.weight pointwise.weight", 1),
        _channels("stem_bn.weight outer_bn.weight depthwise_bn.weight", 0),
        _channels("stem_bn.bias outer_bn.bias depthwise_bn.bias", 0),
    ),
    "inner": Group(
        5,
        _channels("inner.weight", 0),
        _channels("outer.weight", 1),
        _channels("inner_bn.weight", 0),
        _channels("inner.bias inner_bn.bias", 0),
    ),
    "pointwise": Group(
        8,
        _channels("pointwise.weight", 0),
        _channels("hidden.weight", 1),
        _channels("pointwise_bn.weight", 0),
        _channels("pointwise_bn.bias", 0),
    ),
    "hidden": Group(7, _channels("hidden.weight", 0), _channels("head.weight", 1), [], _channels("hidden.bias", 0)),
}
ATTENTION = {
    "trunk": Group(
        WIDTH,
        _channels("embed.weight proj.weight", 0),
        _channels("qkv.weight head.weight", 1),
        _channels("norm.weight", 0),
        _channels("embed.bias norm.bias proj.bias", 0),
    ),
    "heads": Group(
        HEADS, [("qkv.weight", 0, _thrice(_head))], [("proj.weight", 1, _head)], [], [("qkv.bias", 0, _thrice(_head))]
    ),
    "dimensions": Group(
        DIMENSION,
        [("qkv.weight", 0, _thrice(_dimension))],
        [("proj.weight", 1, _dimension)],
        [],
        [("qkv.bias", 0, _thrice(_dimension))],
    ),
}


class Attention(nn.Module):
    """Residual attention between an embedding and a classifier; inputs (batch, 5, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.embed(x)
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.proj(found.transpose(1, 2).reshape(batch, tokens, width))
        return self.head(x.mean(1))


@dataclass
class Case:
    """A net with its groups by hand."""

    model: nn.Module
    graph: ChannelGraph
    task: Task
    groups: dict[str, Group]

    @property
    def names(self) -> dict[str, str]:
        """Name by hand to that of the graph: the group with this size that holds the first maker's axis."""
        found = {}
        for hand, group in self.groups.items():
            parameter, axis, _ = group.makers[0]
            (found[hand],) = [
                traced.name
                for traced in self.graph.groups
                if traced.size == group.size
                and any((member.parameter, member.axis) == (parameter, axis) for member in traced.members)
            ]
        assert len(set(found.values())) == len(self.graph.groups)
        return found

    def by_hand(self, scores):
        return {hand: scores[name] for hand, name in self.names.items() if name in scores}

    def slices(self, members, unit):
        """The unit's slice of each member, double."""
        parameters = dict(self.model.named_parameters())
        return [
            parameters[parameter].detach().double().index_select(axis, torch.tensor(of(unit)))
            for parameter, axis, of in members
        ]

    def read(self, hand):
        """Per reader of a group, per batch, what its module is given, channels last."""
        seen = {parameter: [] for parameter, _, _ in self.groups[hand].readers}

        def hook(parameter):
            def look(module, inputs):
                x = inputs[0].detach()
                seen[parameter].append(x.movedim(1, -1) if x.ndim == 4 else x)

            return look

        handles = [
            self.model.get_submodule(parameter.rpartition(".")[0]).register_forward_pre_hook(hook(parameter))
            for parameter in seen
        ]
        self._run()
        for handle in handles:
            handle.remove()
        return seen

    def _run(self):
        self.model.eval()
        with torch.no_grad():
            for inputs, _ in self.task.objectives[0].train:
                self.model(inputs)
        self.model.train()

    @contextmanager
    def gated(self, gates) -> Iterator[None]:
        """Multiply what the readers of each group read by the gates of its units."""

        def hook(hand, of):
            def gate(module, inputs):
                places = [index for unit in range(self.groups[hand].size) for index in of(unit)]
                repeats = len(places) // self.groups[hand].size
                order = torch.tensor(places).argsort()
                channels = gates[hand].repeat_interleave(repeats)[order]
                return (inputs[0] * (channels[:, None, None] if inputs[0].ndim == 4 else channels),)

            return gate

        handles = [
            self.model.get_submodule(parameter.rpartition(".")[0]).register_forward_pre_hook(hook(hand, of))
            for hand in gates
            for parameter, _, of in self.groups[hand].readers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gate_gradients(self, batches):
        """Per batch the derivative of the loss by a gate on each unit, by automatic differentiation."""
        self.model.eval()
        gates = {hand: torch.ones(group.size, requires_grad=True) for hand, group in self.groups.items()}
        found = {hand: [] for hand in gates}
        with self.gated(gates):
            for inputs, targets in batches:
                loss = cross_entropy(self.model(inputs), targets)
                for hand, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                    found[hand].append(gradient.double().numpy())
        self.model.train()
        return {hand: np.array(rows) for hand, rows in found.items()}


def _attention_case() -> Case:
    torch.manual_seed(0)
    model = Attention()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    data = [(torch.randn(5, TOKENS, 4), torch.randint(0, 4, (5,))) for _ in range(3)]
    task = Task.single(train=data, validation=data, loss=cross_entropy, metric=lambda outputs, targets: 0.0)
    return Case(model, trace(model, torch.zeros(2, TOKENS, 4)), task, ATTENTION)


_ATTENTION = []


@pytest.fixture
def small_case():
    """Residual, depthwise and plain groups."""
    return Case(small_net(), small_graph(), small_task(), SMALL)


@pytest.fixture(params=["convolutional", "attention"])
def case(request, small_case):
    """Residual, depthwise and plain groups; then a residual stream, heads and head dimensions."""
    if request.param == "convolutional":
        return small_case
    if not _ATTENTION:
        _ATTENTION.append(_attention_case())
    return _ATTENTION[0]
