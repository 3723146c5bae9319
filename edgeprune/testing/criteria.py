"""Conformance suite of criteria, on a small net with residual, depthwise and plain groups.

::

    class TestMine(CriterionConformance):
        def criterion(self):
            return Mine()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache

import numpy as np
import torch
from torch import nn

from edgeprune.criteria._base import Criterion
from edgeprune.criteria.damage import damage_curves
from edgeprune.errors import TaskError
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.tracing import trace
from edgeprune.tasks.task import Task


class SmallNet(nn.Module):
    """Convolution, residual block, depthwise and pointwise convolution, two linear layers; inputs (batch, 3, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.inner_bn = nn.BatchNorm2d(5)
        self.outer = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.outer_bn = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(6)
        self.pointwise = nn.Conv2d(6, 8, 1, bias=False)
        self.pointwise_bn = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Class scores, shape (batch, 4)."""
        stem = self.stem_bn(self.stem(inputs)).relu()
        block = self.outer_bn(self.outer(self.inner_bn(self.inner(stem)).relu()))
        wide = self.depthwise_bn(self.depthwise((stem + block).relu())).relu()
        pooled = self.pointwise_bn(self.pointwise(wide)).relu().mean((2, 3))
        scores: torch.Tensor = self.head(self.hidden(pooled).relu())
        return scores


def small_net(seed: int = 0) -> SmallNet:
    """A `SmallNet` with random weights, batch-norm parameters and running statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallNet()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.3, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
    return model


@cache
def small_graph() -> ChannelGraph:
    """Channel groups of `SmallNet`; they are the same for all weights, and capturing takes its time."""
    return trace(small_net(), torch.zeros(2, 3, 6, 6))


def small_task(seed: int = 0, batches: int = 3) -> Task:
    """Random images and labels for `SmallNet`."""
    generator = torch.Generator().manual_seed(seed)
    data = [
        (torch.randn(5, 3, 6, 6, generator=generator), torch.randint(0, 4, (5,), generator=generator))
        for _ in range(batches)
    ]
    return Task.single(
        train=data,
        validation=data,
        loss=nn.functional.cross_entropy,
        metric=lambda outputs, targets: float((outputs.argmax(1) == targets).float().mean()),
    )


class CriterionConformance(ABC):
    """What every criterion must do."""

    @abstractmethod
    def criterion(self) -> Criterion:
        """The criterion under test."""

    def groups(self, graph: ChannelGraph) -> list[str]:
        """Names of the groups that the criterion can score; all by default."""
        return [group.name for group in graph.groups]

    def _scored(self) -> tuple[SmallNet, ChannelGraph, dict[str, np.ndarray]]:
        model, graph = small_net(), small_graph()
        return model, graph, self.criterion().score(graph, model, small_task(), groups=self.groups(graph))

    def test_each_unit_gets_one_finite_score_of_at_least_0(self) -> None:
        _, graph, scores = self._scored()
        assert list(scores) == self.groups(graph)
        for name, values in scores.items():
            assert values.shape == (graph.group(name).size,)
            assert values.dtype == np.float64
            assert np.isfinite(values).all()
            assert (values >= 0).all()
        assert any(len(np.unique(values)) > 1 for values in scores.values())

    def test_a_second_call_gives_the_same_scores(self) -> None:
        first, second = self._scored()[2], self._scored()[2]
        assert all(np.array_equal(first[name], second[name]) for name in first)

    def test_the_model_is_left_as_it_was(self) -> None:
        model = small_net()
        model.inner_bn.eval()
        model.stem.weight.requires_grad_(False)
        model.head.weight.grad = torch.ones_like(model.head.weight)
        graph = small_graph()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        forms = [module.training for module in model.modules()]
        self.criterion().score(graph, model, small_task(), groups=self.groups(graph))
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == forms
        assert not model.stem.weight.requires_grad
        assert model.stem.weight.grad is None
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))

    def test_groups_can_be_left_out(self) -> None:
        model, graph, scores = self._scored()
        first = self.groups(graph)[0]
        alone = self.criterion().score(graph, model, small_task(), groups=[first])
        assert list(alone) == [first]
        assert np.array_equal(alone[first], scores[first])

    def test_a_criterion_that_needs_a_task_says_so(self) -> None:
        model, graph = small_net(), small_graph()
        criterion = self.criterion()
        error = None
        try:
            criterion.score(graph, model, None, groups=self.groups(graph))
        except TaskError as raised:
            error = raised
        assert (error is not None) == criterion.needs_task
        assert error is None or error.hint

    def test_scores_make_damage_curves(self) -> None:
        _, graph, scores = self._scored()
        for name, curve in damage_curves(scores, self.criterion().normalization).items():
            assert curve.shape == (graph.group(name).size + 1,)
            assert curve[-1] == 0
            assert (np.diff(curve) <= 0).all()
