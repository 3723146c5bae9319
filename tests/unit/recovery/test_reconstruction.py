"""Least-squares reconstruction of cut models, against closed forms and by what it must never do."""

import copy
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.errors import ConfigError, ModelError, TaskError
from edgeprune.graph.tracing import trace
from edgeprune.recovery.reconstruction import _AT_ONCE, _live_bytes, reconstruct
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import make_plan, uniform_plan


def batches(*shape, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=generator) + 0.3, None) for _ in range(count)]


def randomized(model, seed=0):
    """Weights, statistics and biases that hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                fan = max(1, value[0].numel()) if value.ndim > 1 else 1
                value.copy_(0.5 + noise.abs() if name.endswith("running_var") else noise / fan**0.5)
    return model.eval()


class Residual(nn.Module):
    def __init__(self, inplace=True, bias=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=bias)
        self.stem_bn = nn.BatchNorm2d(12)
        self.first, self.first_bn = nn.Conv2d(12, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16)
        self.second, self.second_bn = nn.Conv2d(16, 12, 3, padding=1, bias=bias), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.norm, self.act = nn.BatchNorm2d(12), nn.ReLU(inplace)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.act(self.stem_bn(self.stem(x)))
        y = self.second_bn(self.second(self.act(self.first_bn(self.first(x)))))
        x = self.act(x + y)
        return self.head(self.act(self.norm(self.depthwise(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 4
        self.norm, self.qkv, self.proj = nn.LayerNorm(24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 7)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x.mean(1))


def cases():
    plain = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2), nn.ReLU(True))
    return {
        "plain": (plain, (8, 3, 12, 12)),
        "residual": (Residual(), (8, 3, 12, 12)),
        "residual with biases": (Residual(inplace=False, bias=True), (8, 3, 12, 12)),
        "attention": (Attention(), (8, 9, 24)),
    }


def cut(model, example, ratio=0.5):
    graph = trace(model, example)
    plan = uniform_plan(graph, ratio)
    return graph, plan, apply(model, plan)


def distance(one, two, data):
    with torch.no_grad():
        return float(sum(((one(x) - two(x)) ** 2).sum() for x, _ in data) / sum((two(x) ** 2).sum() for x, _ in data))


@pytest.mark.parametrize("name", cases())
def test_what_the_cut_model_computes_comes_closer_to_the_dense_one(name):
    model, shape = cases()[name]
    model = randomized(model)
    data, held_out = batches(*shape, count=16), batches(*shape, seed=1)
    graph, plan, module = cut(model, data[0][0])
    before = copy.deepcopy(module.state_dict())
    dense = copy.deepcopy(model.state_dict())
    far = distance(module, model, held_out)
    record = reconstruct(module, graph, plan, data[0][0], data, samples=128)
    assert record.details["after"] < record.details["before"]
    assert record.details["layers"] >= 2
    assert distance(module, model, held_out) < 0.7 * far
    assert not module.training
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert not any("depthwise" in name for name in changed)
    # Batch norms right behind a refitted layer are moved, and keep their scale.
    assert not any(name.endswith("_bn.running_var") for name in changed)


def test_removed_channels_that_others_make_up_for_leave_no_trace():
    """Every removed channel is a combination of those that stay, so the next layer can say the same without it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)).eval()
    with torch.no_grad():
        mix = torch.randn(4, 6)
        model[0].weight[6:], model[0].bias[6:] = mix @ model[0].weight[:6], mix @ model[0].bias[:6] + 0.7
    data = batches(32, 6)
    graph = trace(model, data[0][0])
    (group,) = graph.groups
    plan = make_plan(graph, {group.name: tuple(range(6))})
    module = apply(model, plan)
    assert distance(module, model, data) > 0.1
    record = reconstruct(module, graph, plan, data[0][0], data, ridge=0.0)
    assert distance(module, model, batches(32, 6, seed=3)) < 1e-10
    assert record.details["before"] > 0.1 > 1e-6 > record.details["after"]


def test_it_is_the_least_squares_solution():
    """One layer behind a cut one, all positions: numpy's solution of the same rows, and the ridge by its normal equations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 9, 1), nn.Tanh(), nn.Conv2d(9, 4, 3, padding=1)).eval()
    data = batches(4, 2, 7, 7, count=3)
    graph = trace(model, data[0][0])
    kept = (0, 2, 3, 6, 8)
    plan = make_plan(graph, {graph.groups[0].name: kept})
    with torch.no_grad():
        inner = torch.cat([model[1](model[0](x)) for x, _ in data])
        target = torch.cat([model(x) for x, _ in data]).permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    unfolded = nn.functional.unfold(inner[:, list(kept)], 3, padding=1).transpose(1, 2)
    rows = unfolded.reshape(-1, 5 * 9).double().numpy()
    with_ones = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(with_ones, target, rcond=None)
    module = apply(model, plan)
    old = module[2].weight.detach().double().numpy().reshape(4, -1)
    reconstruct(module, graph, plan, data[0][0], data, ridge=0.0)
    np.testing.assert_allclose(module[2].weight.detach().numpy().reshape(4, -1).T, solution[:-1], atol=1e-4)
    np.testing.assert_allclose(module[2].bias.detach().numpy(), solution[-1], atol=1e-4)
    # The first layer reads what it did before: it stays.
    torch.testing.assert_close(module[0].weight, model[0].weight[list(kept)], atol=1e-5, rtol=0)
    module = apply(model, plan)
    reconstruct(module, graph, plan, data[0][0], data, ridge=0.1)
    centered, wanted = rows - rows.mean(0), target - target.mean(0)
    gram = centered.T @ centered
    level = 0.1 * gram.diagonal().mean()
    ridged = np.linalg.solve(gram + level * np.eye(len(gram)), centered.T @ wanted + level * old.T)
    np.testing.assert_allclose(module[2].weight.detach().numpy().reshape(4, -1).T, ridged, atol=1e-4)


def test_a_branch_makes_up_for_what_the_other_addend_lost():
    """The last layer of a branch can say all that the sum needs, and the shortcut, which comes first, has lost everything."""
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.short, self.branch = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 6)

        def forward(self, x):
            lost = self.short(self.wide(x) ** 2)
            return lost + self.branch(x)

    model = Sum().eval()
    with torch.no_grad():
        # What is squared is linear on the calibration data, which are 0 or 1 in one place.
        model.wide.bias.zero_()
    eye = torch.eye(6)
    data = [(eye, None)]
    graph = trace(model, eye)
    group = next(group for group in graph.groups if group.size == 12)
    plan = make_plan(graph, {group.name: (0,)})
    module = apply(model, plan)
    assert distance(module, model, data) > 0.01
    reconstruct(module, graph, plan, eye, data, ridge=0.0)
    assert distance(module, model, data) < 1e-8


def test_what_cannot_be_done_is_refused_and_changes_nothing():
    model = randomized(Residual())
    data = batches(4, 3, 8, 8)
    graph, plan, module = cut(model, data[0][0])
    before = copy.deepcopy(module.state_dict())
    for options, error, words in (
        ({"samples": 0}, ConfigError, "at least 1 sample"),
        ({"ridge": -1.0}, ConfigError, "ridge of at least 0"),
        ({"loader": []}, TaskError, "calibration data"),
        ({"loader": [(torch.zeros(4, 3, 9, 9), None)]}, TaskError, "shapes of the example inputs"),
    ):
        with pytest.raises(error, match=words):
            reconstruct(module, graph, plan, data[0][0], **{"loader": data, **options})
    other = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).eval()
    with pytest.raises(ModelError, match="must run the operations of the dense one"):
        reconstruct(other, graph, plan, data[0][0], data)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_rows_that_hold_a_folded_attention_scale_stay():
    """Forward recomputes the scale from the head dimension; the query rows make up for it, and the dense ones do not."""
    model, shape = cases()["attention"]
    model = randomized(model)
    data = batches(*shape)
    graph, plan, module = cut(model, data[0][0])
    folded = {name for rewrite in plan.rewrites for name in rewrite.get("fold", {}).get("rows", {})}
    assert folded
    assert type(module) is Attention
    before = copy.deepcopy(module.state_dict())
    reconstruct(module, graph, plan, data[0][0], data)
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in folded)
    assert not torch.equal(after["down.weight"], before["down.weight"])


class Masked(nn.Module):
    """A sum whose other addend has one channel, and a bias that two layers share."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.shift = nn.Conv2d(8, 8, 1, bias=False), nn.Parameter(torch.randn(8))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        mask = x.mean(1, keepdim=True)
        x = self.second(self.first(x)) + mask
        x = nn.functional.conv2d(x, self.third.weight, self.shift).relu()
        return self.head(nn.functional.conv2d(x, self.third.weight, self.shift))


def test_broadcast_sums_and_shared_parameters_are_passed_over():
    model = randomized(Masked())
    data = batches(4, 3, 6, 6)
    graph, plan, module = cut(model, data[0][0])
    before = copy.deepcopy(module.state_dict())
    reconstruct(module, graph, plan, data[0][0], data)
    assert torch.equal(module.state_dict()["third.weight"], before["third.weight"])
    assert torch.equal(module.state_dict()["shift"], before["shift"])
    assert not torch.equal(module.state_dict()["head.weight"], before["head.weight"])


def test_no_more_samples_are_taken_than_were_asked_for():
    model = randomized(Residual())
    data = batches(8, 3, 8, 8)
    graph, plan, module = cut(model, data[0][0])
    assert reconstruct(module, graph, plan, data[0][0], data, samples=11).details["samples"] == 11


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_batches_for_which_there_is_no_room_are_computed_again_and_come_to_the_same(name):
    model, shape = cases()[name]
    model = randomized(model)
    data = batches(*shape, count=12)
    graph, plan, module = cut(model, data[0][0])
    other = copy.deepcopy(module)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    with FlopCounterMode(display=False) as once:
        reconstruct(module, graph, plan, data[0][0], data)
    # Room for one batch in both programs beside a part of the others.
    little = int(2 * shape[0] * _live_bytes(graph) / _AT_ONCE)
    with FlopCounterMode(display=False) as again:
        reconstruct(other, graph, plan, data[0][0], data, most_bytes=little)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())
    assert again.get_total_flops() > 1.1 * once.get_total_flops(), "nothing was computed again"


class Wide(nn.Module):
    """Large activations, little work."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(layer for at in range(4) for layer in (nn.Conv2d(1 if at == 0 else 16, 16, 1), nn.ReLU()))
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside of it and are still there; `most` is their peak.

    What the process holds says less: an allocator with the leftovers of a thousand tests keeps what it was given back.
    """

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage._cdata not in given:
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _gone(self, count):
        self.now -= count


def test_memory_is_bounded():
    model = randomized(Wide())
    data = [(torch.randn(64, 1, 192, 192), None)]
    graph, plan, module = cut(model, data[0][0][:2])
    allowed = 2**26
    assert 64 * 2 * _live_bytes(graph) > 8 * allowed, "all of it must not fit"
    with Living() as living:
        record = reconstruct(module, graph, plan, data[0][0][:2], data, most_bytes=allowed)
    assert record.details["samples"] == 64
    assert 0 < living.most <= allowed


def storages(tree):
    """What holds the values of the tensors in there; none for tensors without values, with which a model is traced."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf))
    return [storage for storage in found if storage.device.type != "meta"]
