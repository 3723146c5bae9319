"""Criteria that look at data equal their formulas, evaluated with hooks on modules and by automatic differentiation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeprune.criteria.activation import ActivationMean, ActivationRms, Apoz
from edgeprune.criteria.fisher import Fisher
from edgeprune.criteria.lasso import Lasso
from edgeprune.criteria.patches import patches
from edgeprune.criteria.taylor import Taylor
from edgeprune.errors import ConfigError, ModelError, TaskError
from edgeprune.graph.tracing import trace
from edgeprune.tasks.task import Objective, Task
from edgeprune.testing.criteria import SmallNet, small_graph, small_net, small_task

DATA = [Fisher, ActivationMean, ActivationRms, Apoz, Lasso]


def found(case, criterion):
    return case.by_hand(criterion.score(case.graph, case.model, case.task))


def singles(batches):
    return [(inputs[i : i + 1], targets[i : i + 1]) for inputs, targets in batches for i in range(len(targets))]


def test_taylor_is_the_mean_square_of_the_derivative_by_a_gate(case):
    gradients = case.gate_gradients(case.task.objectives[0].train)
    for hand, values in found(case, Taylor()).items():
        np.testing.assert_allclose(values, np.mean(gradients[hand] ** 2, axis=0), rtol=2e-3, atol=1e-10)


def test_fisher_is_half_the_mean_square_of_the_derivative_of_each_sample(case):
    gradients = case.gate_gradients(singles(case.task.objectives[0].train))
    for hand, values in found(case, Fisher()).items():
        assert len(gradients[hand]) == 15
        np.testing.assert_allclose(values, np.mean(gradients[hand] ** 2, axis=0) / 2, rtol=2e-3, atol=1e-10)


def test_fisher_does_not_depend_on_the_batch_size(small_case):
    objective = small_case.task.objectives[0]
    again = Task.single(
        train=singles(objective.train), validation=objective.validation, loss=objective.loss, metric=objective.metric
    )
    one, other = (Fisher().score(small_case.graph, small_case.model, task) for task in (small_case.task, again))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    first = Fisher(samples=7).score(small_case.graph, small_case.model, small_case.task)
    few = Task.single(
        train=singles(objective.train)[:7],
        validation=objective.validation,
        loss=objective.loss,
        metric=objective.metric,
    )
    exact = Fisher().score(small_case.graph, small_case.model, few)
    assert all(np.array_equal(first[name], exact[name]) for name in first)


def test_fisher_foretells_the_loss_where_the_model_is_the_truth(small_case):
    """Labels drawn from the model itself: the mean gradient vanishes, and the Fisher information is the Hessian."""
    model, graph = small_case.model, small_case.graph
    inputs = torch.randn(1000, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 0.5
    model.eval()
    with torch.no_grad():
        probabilities = model(inputs).softmax(1)
        targets = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(2))[:, 0]

        def expected_loss(scores):
            return float(-(probabilities.double() * scores.double().log_softmax(1)).sum(1).mean())

        before, growth = expected_loss(model(inputs)), {}
        step = 0.2
        for unit in range(small_case.groups["hidden"].size):
            gates = torch.ones(7)
            gates[unit] -= step
            with small_case.gated({"hidden": gates}):
                growth[unit] = (expected_loss(model(inputs)) - before) / step**2
    model.train()
    data = [(inputs[:400], targets[:400])]
    task = Task.single(train=data, validation=data, loss=F.cross_entropy, metric=lambda outputs, targets: 0.0)
    values = small_case.by_hand(Fisher(samples=400).score(graph, model, task))["hidden"]
    # Both sides scatter: 400 samples of a squared quantity, and a step that is not infinitely small.
    np.testing.assert_allclose(values, list(growth.values()), rtol=0.5, atol=2e-4)
    assert np.corrcoef(values, list(growth.values()))[0, 1] > 0.95


def test_fisher_names_what_it_cannot_take_apart(small_case):
    data = [(torch.zeros(2, 3, 6, 6), torch.tensor(1))]
    task = Task.single(
        train=data,
        validation=data,
        loss=lambda outputs, targets: outputs.square().mean(),
        metric=lambda outputs, targets: 0.0,
    )
    with pytest.raises(
        TaskError, match=r"take batches apart along axis 0 of their 2 samples, found shape \(\)"
    ) as caught:
        Fisher().score(small_case.graph, small_case.model, task)
    assert "batch_size=1" in caught.value.hint


@pytest.mark.parametrize(
    ("criterion", "of_values"),
    [(ActivationMean(), lambda x: x.abs().mean()), (ActivationRms(), lambda x: x.square().mean())],
    ids=["mean", "rms"],
)
def test_activation_statistics_are_those_of_what_the_readers_are_given(case, criterion, of_values):
    for hand, values in found(case, criterion).items():
        seen = case.read(hand)
        for unit in range(case.groups[hand].size):
            means = []
            for parameter, _, of in case.groups[hand].readers:
                own = torch.cat([batch[..., of(unit)].double().flatten() for batch in seen[parameter]])
                means.append(float(of_values(own)))
            expected = np.mean(means) if criterion.name == "activation_mean" else np.sqrt(np.mean(means))
            assert values[unit] == pytest.approx(expected, rel=1e-5)


class Product(nn.Module):
    """Queries and keys meet in a product without weights: no layer reads their units."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(9, 4)

    def forward(self, inputs):
        images = inputs.flatten(1)[:, :45].reshape(-1, 9, 5)
        return self.head((self.query(images) * self.key(images)).sum(-1))


def test_units_that_no_layer_reads_are_seen_where_they_are_made():
    torch.manual_seed(0)
    model, task = Product(), small_task(batches=2)
    graph = trace(model, torch.zeros(2, 3, 6, 6))
    (group,) = graph.groups
    images = torch.cat([inputs.flatten(1)[:, :45].reshape(-1, 9, 5) for inputs, _ in task.objectives[0].train])
    with torch.no_grad():
        made = [layer(images).abs().mean((0, 1)) for layer in (model.query, model.key)]
    values = ActivationMean().score(graph, model, task)[group.name]
    np.testing.assert_allclose(values, torch.stack(made).mean(0).numpy(), rtol=1e-5)
    with pytest.raises(
        ModelError, match="lasso criterion needs a layer that reads the channels in every group, found none in query"
    ):
        Lasso().score(graph, model, task)


RECTIFIED = ["trunk", "inner", "trunk", "trunk", "pointwise", "hidden"]
"""Whose units pass each ReLU of `SmallNet`, in the order of its forward."""


def test_apoz_is_the_share_of_values_that_the_relus_leave(small_case, monkeypatch):
    outputs = []
    relu = torch.Tensor.relu

    def recorded(x):
        outputs.append(relu(x))
        return outputs[-1]

    scores = found(small_case, Apoz())
    monkeypatch.setattr(torch.Tensor, "relu", recorded)
    small_case._run()
    for hand, values in scores.items():
        shares = []
        for place in [index for index, name in enumerate(RECTIFIED) if name == hand]:
            seen = torch.cat(outputs[place :: len(RECTIFIED)])
            shares.append((seen > 0).double().movedim(1, 0).flatten(1).mean(1).numpy())
        np.testing.assert_allclose(values, np.mean(shares, axis=0), rtol=1e-9)


def test_apoz_needs_something_that_makes_zeros(case):
    if case.graph is small_graph():
        Apoz().score(case.graph, case.model, case.task)
    else:
        with pytest.raises(ModelError, match="apoz criterion needs a ReLU in every group, found none in embed"):
            Apoz().score(case.graph, case.model, case.task)


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.six, self.tanh, self.head = nn.ReLU6(inplace=True), nn.Hardtanh(), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.head(self.tanh(self.second(self.six(self.first(x))))).mean((2, 3))


def test_relu6_makes_zeros_and_a_symmetric_clamp_does_not():
    torch.manual_seed(0)
    model, task = Clamped(), small_task()
    graph = trace(model, torch.zeros(2, 3, 6, 6))
    first, second = (group.name for group in graph.groups)
    with torch.no_grad():
        seen = torch.cat([model.first(inputs) > 0 for inputs, _ in task.objectives[0].train])
    values = Apoz().score(graph, model, task, groups=[first])[first]
    np.testing.assert_allclose(values, seen.double().mean((0, 2, 3)).numpy())
    with pytest.raises(ModelError, match=f"found none in {second}"):
        Apoz().score(graph, model, task)


# LASSO


def contributions(case, hand):
    """Per unit what it adds to the outputs of all readers, as one long vector.

    Outputs are centered and of total energy 1 per reader, rows are all positions of all samples.
    """
    columns = []
    seen = case.read(hand)
    for parameter, _, of in case.groups[hand].readers:
        module = case.model.get_submodule(parameter.rpartition(".")[0])
        parts = []
        for unit in range(case.groups[hand].size):
            rows = []
            for batch in seen[parameter]:
                alone = torch.zeros_like(batch, dtype=torch.float64)
                alone[..., of(unit)] = batch[..., of(unit)].double()
                weight = module.weight.detach().double()
                if isinstance(module, nn.Linear):
                    out = alone @ weight.T
                else:
                    out = F.conv2d(alone.movedim(-1, 1), weight, padding=module.padding).movedim(1, -1)
                rows.append(out.reshape(-1, out.shape[-1]))
            rows = torch.cat(rows)
            parts.append((rows - rows.mean(0)).flatten().numpy())
        columns.append(np.array(parts) / np.linalg.norm(np.sum(parts, axis=0)))
    return np.concatenate(columns, axis=1) / np.sqrt(len(columns))


def solved(columns, penalty):
    """The LASSO by cyclic coordinate descent on the explicit columns' products; what is zero throughout is not used."""
    products = columns @ columns.T
    coefficients, pulls = np.zeros(len(columns)), products.sum(axis=1)
    for _ in range(20_000):
        largest = 0.0
        for unit in np.flatnonzero(np.diag(products) > 0):
            pull = pulls[unit] + products[unit, unit] * coefficients[unit]
            new = np.sign(pull) * max(abs(pull) - penalty, 0.0) / products[unit, unit]
            step = new - coefficients[unit]
            pulls -= step * products[unit]
            coefficients[unit] = new
            largest = max(largest, abs(step))
        if largest < 1e-9:
            break
    return coefficients


def test_lasso_scores_are_the_penalties_at_which_units_enter(case):
    scores = found(case, Lasso(positions=None))
    for hand, values in scores.items():
        columns = contributions(case, hand)
        assert values.max() == pytest.approx(np.max(np.abs(columns @ columns.sum(axis=0))), rel=1e-5)
        for unit, score in enumerate(values):
            if not columns[unit].any():
                assert score == 0
                continue
            below, above = (solved(columns, factor * score) for factor in (0.999, 1.001))
            assert abs(below[unit]) > 0
            assert above[unit] == 0
        # At any penalty nothing is used that has not entered yet.
        for penalty in np.quantile(values, [0.1, 0.5, 0.9]):
            assert (solved(columns, penalty)[values < penalty * 0.999] == 0).all()


def test_lasso_drops_one_of_two_equal_units_and_what_never_changes(small_case):
    model = small_case.model
    with torch.no_grad():
        model.hidden.weight[1] = model.hidden.weight[0]
        model.hidden.bias[1] = model.hidden.bias[0]
        model.hidden.weight[2] = 0.0
        model.hidden.bias[2] = 5.0
    values = found(small_case, Lasso())["hidden"]
    assert values[2] == 0
    assert (values[[3, 4, 5, 6]] >= 0).all()
    assert np.isfinite(values).all()


def test_lasso_finds_nothing_where_nothing_varies(small_case):
    data = [(torch.zeros(1, 3, 6, 6), torch.zeros(1, dtype=torch.long))]
    task = Task.single(train=data, validation=data, loss=F.cross_entropy, metric=lambda outputs, targets: 0.0)
    scores = Lasso().score(small_case.graph, small_case.model, task)
    assert not scores[small_case.names["hidden"]].any()
    assert all(np.isfinite(values).all() for values in scores.values())


def test_lasso_looks_at_few_positions_and_the_same_ones_again(small_case):
    few, again, other = (
        Lasso(positions=3, seed=seed).score(small_case.graph, small_case.model, small_case.task) for seed in (0, 0, 1)
    )
    exact = Lasso(positions=None).score(small_case.graph, small_case.model, small_case.task)
    trunk = small_case.names["trunk"]
    assert np.array_equal(few[trunk], again[trunk])
    assert not np.array_equal(few[trunk], other[trunk])
    # The classifier reads one position: nothing is left to choose.
    hidden = small_case.names["hidden"]
    np.testing.assert_array_equal(few[hidden], exact[hidden])


LAYERS = [
    (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 5)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (4, 7, 5)),
    (nn.Conv2d(4, 6, 3, padding="valid"), (4, 7, 5)),
    (nn.Conv2d(4, 6, 3, stride=2, groups=2), (4, 7, 5)),
    (nn.Conv1d(4, 6, 5, stride=3, padding=2), (4, 11)),
    (nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 0)), (2, 3, 5, 4)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (4, 5, 4)),
    (nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 3), dilation=2, groups=2), (4, 5, 4)),
    (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=3), (4, 6)),
    (nn.Linear(4, 6), (3, 4)),
    (nn.Linear(4, 6), (4,)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
def test_patches_times_weight_are_the_layers_output(layer, shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    named = {"weight": layer.weight.detach()}
    if not isinstance(layer, nn.Linear):
        # As the operation has them: a single number may stand for all axes.
        named |= {"stride": list(layer.stride), "dilation": list(layer.dilation), "groups": layer.groups}
        named["padding"] = layer.padding if isinstance(layer.padding, str) else list(layer.padding)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        named["output_padding"] = list(layer.output_padding)
    with torch.no_grad():
        rows, weight = patches(x, named, None, torch.Generator())
        found = torch.einsum("ngck,gock->ngo", rows, weight).flatten(1)
        out = layer(x) - (
            layer.bias if isinstance(layer, nn.Linear) else layer.bias.view(1, -1, *[1] * (len(shape) - 1))
        )
    expected = out if isinstance(layer, nn.Linear) else out.movedim(1, -1)
    torch.testing.assert_close(found, expected.reshape(len(found), -1), rtol=1e-4, atol=1e-5)
    some, _ = patches(x, named, 2, torch.Generator().manual_seed(0))
    assert len(some) == min(2 * 2, len(rows))
    assert all((rows == row).flatten(1).all(1).any() for row in some)


class Grouped(nn.Module):
    """Conv groups that lose channels in step, a transposed convolution, and a concatenation of two groups."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2)
        self.up, self.beside, self.head = nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Conv2d(3, 4, 3), nn.Linear(9, 4)

    def forward(self, x):
        wide = self.up(self.grouped(self.first(x).relu()).relu()).relu().mean((2, 3))
        return self.head(torch.cat([wide, self.beside(x).relu().mean((2, 3))], 1))


@pytest.mark.parametrize("kind", DATA)
def test_conv_groups_transposed_convolutions_and_concatenations_are_scored(kind):
    torch.manual_seed(0)
    model, task = Grouped(), small_task()
    graph = trace(model, torch.zeros(2, 3, 6, 6))
    scores = kind().score(graph, model, task)
    assert len(scores) == len(graph.groups) >= 4
    assert all((values > 0).any() for values in scores.values())


# What goes wrong


@pytest.mark.parametrize("kind", DATA)
def test_the_model_is_left_as_it_was_when_a_batch_breaks_off(kind):
    model = small_net()
    model.stem.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    good = small_task().objectives[0].train[0]

    class Broken:
        def __iter__(self):
            yield good
            raise OSError("the disk is gone")

    task = Task.single(train=Broken(), validation=[good], loss=F.cross_entropy, metric=lambda outputs, targets: 0.0)
    with pytest.raises(TaskError, match="the disk is gone"):
        kind().score(small_graph(), model, task)
    assert all(module.training for module in model.modules())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["stem.weight"]


@pytest.mark.parametrize("kind", DATA)
def test_no_more_batches_are_read_than_asked_for(kind):
    class Counting:
        def __init__(self):
            self.read = 0

        def __iter__(self):
            for batch in small_task(batches=6).objectives[0].train:
                self.read += 1
                yield batch

    loader = Counting()
    task = Task.single(
        train=loader,
        validation=small_task().objectives[0].validation,
        loss=F.cross_entropy,
        metric=lambda outputs, targets: 0.0,
    )
    limit = {"samples": 10} if kind is Fisher else {"batches": 2}
    kind(**limit).score(small_graph(), small_net(), task)
    assert loader.read == 2


@pytest.mark.parametrize("kind", DATA)
def test_objectives_add_by_weight(kind):
    model, graph = small_net(), small_graph()
    one, other = (small_task(seed).objectives[0] for seed in (1, 2))
    both = Task(
        (
            Objective("one", one.train, one.validation, one.loss, one.metric),
            Objective("other", other.train, other.validation, other.loss, other.metric, weight=0.25),
        )
    )
    scores = kind().score(graph, model, both)
    parts = [kind().score(graph, model, small_task(seed)) for seed in (1, 2)]
    for name, values in scores.items():
        np.testing.assert_allclose(values, parts[0][name] + 0.25 * parts[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [ActivationMean, ActivationRms, Lasso])
def test_values_that_are_not_finite_are_refused(kind):
    data = [(torch.full((2, 3, 6, 6), float("nan")), torch.zeros(2, dtype=torch.long))]
    task = Task.single(train=data, validation=data, loss=F.cross_entropy, metric=lambda outputs, targets: 0.0)
    with pytest.raises(TaskError, match=f"activations must be finite for the {kind.name} criterion"):
        kind().score(small_graph(), small_net(), task)


@pytest.mark.parametrize("kind", [ActivationMean, Lasso])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"shapes of the example inputs but for the batch, .*found \[\(2, 3, 8, 8\)\]"),
        ({"x": torch.zeros(2, 3, 6, 6)}, "nested like the example inputs"),
        (["no tensor"], "must hold at least one tensor"),
    ],
)
def test_batches_that_do_not_fit_the_program_are_refused(kind, inputs, message):
    data = [(inputs, torch.zeros(2, dtype=torch.long))]
    task = Task.single(train=data, validation=data, loss=F.cross_entropy, metric=lambda outputs, targets: 0.0)
    with pytest.raises(TaskError, match=message):
        kind().score(small_graph(), small_net(), task)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 6), nn.Linear(3, 5), nn.Linear(11, 4)

    def forward(self, left, right, scale=None):
        return self.head(torch.cat([self.one(left).relu(), self.other(right).relu()], 1))


def test_inputs_by_name_may_come_in_any_order_or_by_place():
    torch.manual_seed(0)
    model, left, right, labels = Named(), torch.randn(6, 4), torch.randn(6, 3), torch.zeros(6, dtype=torch.long)
    graph = trace(model, {"left": left[:2], "right": right[:2]})

    def scored(inputs):
        data = [(inputs, labels)]
        task = Task.single(train=data, validation=data, loss=F.cross_entropy, metric=lambda outputs, targets: 0.0)
        return ActivationMean().score(graph, model, task)

    one, other = scored({"left": left, "right": right}), scored({"right": right, "left": left})
    for inputs in ((left, right), [left, right]):
        by_place = scored(inputs)
        assert all(np.array_equal(one[name], by_place[name]) for name in one), "as the model itself takes them"
    with pytest.raises(TaskError, match="nested like the example inputs"):
        scored((left, right, None))
    with torch.no_grad():
        expected = model.one(left).relu().mean(0).numpy()
    assert len(one) == 2
    np.testing.assert_allclose(one["one"], expected, rtol=1e-5)
    assert all(np.array_equal(one[name], other[name]) for name in one)


class Fixed(SmallNet):
    """Works for two samples alone."""

    def forward(self, inputs):
        return super().forward(inputs.reshape(2, 3, 6, 6))


def test_a_program_of_one_batch_size_gets_batches_in_pieces():
    model = Fixed()
    graph = trace(model, torch.zeros(2, 3, 6, 6))
    assert not graph.dynamic_batch
    samples = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(6, dtype=torch.long)

    def scored(*sizes):
        data, start = [], 0
        for size in sizes:
            data.append((samples[start : start + size], labels[start : start + size]))
            start += size
        task = Task.single(train=data, validation=data, loss=F.cross_entropy, metric=lambda outputs, targets: 0.0)
        return ActivationMean().score(graph, model, task)

    whole, pieces, rest = scored(4), scored(2, 2), scored(5)
    for name, values in whole.items():
        np.testing.assert_allclose(pieces[name], values, rtol=1e-6)
        np.testing.assert_array_equal(rest[name], values)
    with pytest.raises(TaskError, match="at least the 2 samples that the model was traced for, found 1"):
        scored(1)


def test_options_are_checked():
    with pytest.raises(ConfigError, match="at least 1 sample, found samples=0"):
        Fisher(samples=0)
    with pytest.raises(ConfigError, match="the apoz criterion must use at least 1 batch, found batches=0"):
        Apoz(batches=0)
    with pytest.raises(ConfigError, match="found batches=8 and positions=0"):
        Lasso(positions=0)
