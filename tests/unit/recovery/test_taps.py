"""Taps: where features of a cut model are compared, and that channels there are those of the dense model."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from edgeprune.errors import ConfigError, ModelError, TaskError
from edgeprune.graph.tracing import trace
from edgeprune.recovery.distillation.attention import Attention
from edgeprune.recovery.distillation.features import Features
from edgeprune.recovery.fine_tuning import fine_tune
from edgeprune.recovery.taps import find_taps, require_places
from edgeprune.recovery.teaching import Teaching
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import make_plan, uniform_plan
from edgeprune.surgery.program_module import ProgramModule


class Block(nn.Module):
    def __init__(self, width, inner, inplace):
        super().__init__()
        self.first, self.first_bn = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.second, self.second_bn = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace)

    def forward(self, x):
        inner = self.second_bn(self.second(self.act(self.first_bn(self.first(x)))))
        inner += x
        return self.act(inner)


class Net(nn.Module):
    """Two stages of residual blocks; the sums overwrite their addend, and activations may overwrite the sum."""

    def __init__(self, inplace=True):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.one = nn.Sequential(Block(12, 10, inplace), Block(12, 14, inplace))
        self.down, self.down_bn = nn.Conv2d(12, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.two = nn.Sequential(Block(16, 12, inplace), Block(16, 18, inplace))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.one(self.stem_bn(self.stem(x)).relu())
        x = self.two(self.down_bn(self.down(x)).relu())
        return self.head(x.mean((2, 3)))


EXAMPLE = torch.zeros(1, 1, 8, 8)


def trained(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                fan = max(1, value[0].numel()) if value.ndim > 1 else 1
                value.copy_(0.5 + noise.abs() if name.endswith("running_var") else noise / fan**0.5)
    return model.eval()


@cache
def dense(inplace=True):
    model = trained(Net(inplace))
    return model, trace(model, EXAMPLE)


def without_blocks(graph, *names):
    emptied = {group: () for branch in graph.branches if branch.name in names for group in branch.groups}
    halved = {one.name: tuple(range(0, one.size, 2)) for one in graph.groups if one.name not in emptied}
    return make_plan(graph, {**halved, **emptied})


def features(model, taps, student, inputs):
    """What `Teaching` compares, in eval form."""
    teaching = Teaching(model, student, (Features(),), taps)
    student = student.eval()
    with teaching.attached(), torch.no_grad():
        teaching.begin()
        student(*inputs)
        teaching.wanted(inputs)
        return [teaching._features(number, tap) for number, tap in enumerate(taps)]


@pytest.mark.parametrize("inplace", [True, False])
def test_the_ends_of_stages_are_compared(inplace):
    model, graph = dense(inplace)
    plan = uniform_plan(graph, 0.5)
    module = apply(model, plan)
    inputs = (torch.randn(3, 1, 8, 8),)
    one, two = features(model, find_taps(graph, plan, module), module, inputs)
    with torch.no_grad():
        for (student, kept, whole), blocks in ((one, 1), (two, 2)):

            def end(net, blocks=blocks):
                x = net.one(net.stem_bn(net.stem(*inputs)).relu())
                return x if blocks == 1 else net.two(net.down_bn(net.down(x)).relu())

            assert torch.equal(student, end(module).flatten(2))
            assert torch.equal(whole, end(model).flatten(2))
            name = f"{'one' if blocks == 1 else 'two'}.1.second_bn.weight"
            assert torch.equal(kept, whole[:, list(plan.kept[name][0])])
            assert student.shape == kept.shape


def test_a_model_that_lost_nothing_has_the_features_of_the_dense_one():
    model, graph = dense()
    plan = make_plan(graph, {}, allow_empty=True)
    module = apply(model, plan)
    for student, kept, whole in features(model, find_taps(graph, plan, module), module, (torch.randn(2, 1, 8, 8),)):
        assert torch.equal(student, kept)
        assert torch.equal(kept, whole)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("gone", [("one.0",), ("one.1", "two.1"), ("one.0", "one.1", "two.0", "two.1")])
def test_blocks_that_went_as_a_whole_leave_their_sums_to_compare(gone, inplace):
    model, graph = dense(inplace)
    plan = without_blocks(graph, *gone)
    assert {branch["name"] for branch in plan.removed} == set(gone)
    module = apply(model, plan)
    assert isinstance(module, ProgramModule)
    taps = find_taps(graph, plan, module)
    assert len(taps) == 2
    for student, kept, whole in features(model, taps, module, (torch.randn(3, 1, 8, 8),)):
        assert student.shape == kept.shape
        assert 2 * kept.shape[1] == whole.shape[1]


def test_a_cut_program_shows_what_the_models_own_class_does():
    model, graph = dense()
    plan = uniform_plan(graph, 0.4)
    own = apply(model, plan)
    program = ProgramModule.of(copy.deepcopy(own), plan.program).eval()
    inputs = (torch.randn(3, 1, 8, 8),)
    names = ("one.0.second", "one.1", "down_bn", "two")
    pairs = zip(
        features(model, find_taps(graph, plan, own, names), own, inputs),
        features(model, find_taps(graph, plan, program, names), program, inputs),
        strict=True,
    )
    for one, two in pairs:
        torch.testing.assert_close(one, two)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(self.layers(self.embed(ids)).mean(1))


def test_a_transformer_is_compared_at_four_depths():
    torch.manual_seed(0)
    model, ids = Words().eval(), torch.randint(20, (2, 7))
    graph = trace(model, ids)
    plan = uniform_plan(graph, 0.5)
    module = apply(model, plan)
    taps = find_taps(graph, plan, module)
    assert 2 <= len(taps) <= 4
    assert {tap.axis for tap in taps} == {2}
    for student, kept, _ in features(model, taps, module, (ids,)):
        assert student.shape == kept.shape == (2, len(kept[0]), 7)


def test_the_loss_pulls_the_cut_model_toward_the_dense_one_through_all_of_its_layers():
    model, graph = dense()
    plan = without_blocks(graph, "one.0")
    module = apply(model, plan).train()
    teaching = Teaching(model, module, (Features(), Attention()), find_taps(graph, plan, module))
    inputs = torch.randn(4, 1, 8, 8)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    before = copy.deepcopy(model.state_dict())
    with teaching.attached():
        for _ in range(25):
            teaching.begin()
            outputs = module(inputs)
            loss = teaching.loss(outputs, teaching.wanted(inputs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    silent = [name for name, one in module.named_parameters() if one.grad is None or not one.grad.any()]
    assert all(name.startswith("head") for name in silent)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    # Nothing watches any more.
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in (*model.modules(), *module.modules()))


def test_fine_tuning_with_features_learns(task):
    torch.manual_seed(0)
    model = Net()
    fine_tune(model, task, epochs=2, lr=5e-3)
    graph = trace(model, EXAMPLE)
    plan = uniform_plan(graph, 0.3)
    module = apply(model, plan)
    record = fine_tune(
        module,
        task,
        epochs=2,
        lr=5e-3,
        teacher=model,
        distillation=("logits", "features", "channelwise", "attention"),
        taps=find_taps(graph, plan, module),
    )
    assert record.after["accuracy"] > max(0.5, record.before["accuracy"] + 0.2)


def test_taps_that_cannot_be_are_named():
    model, graph = dense()
    plan = without_blocks(graph, "one.0")
    module = apply(model, plan)
    with pytest.raises(ConfigError, match="a tap must be a module that the model runs, found 'three'"):
        find_taps(graph, plan, module, ["three"])
    with pytest.raises(ConfigError, match="those of 'head' do not"):
        find_taps(graph, plan, module, ["head"])
    with pytest.raises(ConfigError, match=r"those of 'one\.0\.first' do not"):
        find_taps(graph, plan, module, ["one.0.first"])
    with pytest.raises(ConfigError, match="features distillation needs taps, found none"):
        Teaching(model, module, (Features(),), ())
    flat = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    graph = trace(flat, torch.zeros(2, 4))
    plan = uniform_plan(graph, 0.5)
    with pytest.raises(ModelError, match="values with channels and positions that both models compute, found none"):
        find_taps(graph, plan, apply(flat, plan))
    with pytest.raises(ModelError, match="values with channels and positions that both models compute, found none"):
        require_places(graph)


def test_what_no_plan_makes_possible_is_refused_before_there_is_one():
    _, graph = dense()
    require_places(graph)
    require_places(graph, ("one.0.first", "two"))
    with pytest.raises(ConfigError, match="a tap must be a module that the model runs, found 'three'"):
        require_places(graph, ("one", "three"))
    with pytest.raises(ConfigError, match="those of 'head' do not"):
        require_places(graph, ("head",))


def test_taps_of_another_plan_are_refused():
    model, graph = dense()
    half, third = (uniform_plan(graph, ratio) for ratio in (0.5, 0.3))
    module = apply(model, half)
    taps = find_taps(graph, third, apply(model, third))
    teaching = Teaching(model, module, (Features(),), taps)
    inputs = torch.randn(2, 1, 8, 8)
    with teaching.attached():
        teaching.begin()
        outputs, wanted = module(inputs), teaching.wanted(inputs)
        with pytest.raises(TaskError, match="must have the shape that the plan says"):
            teaching.loss(outputs, wanted)
