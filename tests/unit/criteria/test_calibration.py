"""Damage on the scale of measured losses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.criteria import calibration
from edgeprune.criteria.calibration import DamageCalibration
from edgeprune.criteria.damage import best_units, damage_curves
from edgeprune.criteria.l1 import L1
from edgeprune.criteria.l2 import L2
from edgeprune.criteria.random import Random
from edgeprune.errors import ConfigError, TaskError
from edgeprune.graph.tracing import trace
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import make_plan
from edgeprune.tasks.task import Task


def scored(case, criterion):
    scores = criterion.score(case.graph, case.model)
    return scores, damage_curves(scores, criterion.normalization)


def loss_without(case, hand, gone):
    """Mean loss of a batch with some units of one group at zero where they are read."""
    gates = torch.ones(case.groups[hand].size)
    gates[gone] = 0.0
    case.model.eval()
    with torch.no_grad(), case.gated({hand: gates}):
        losses = [
            float(cross_entropy(case.model(inputs), targets)) for inputs, targets in case.task.objectives[0].train
        ]
    case.model.train()
    return np.mean(losses)


def test_what_is_measured_is_the_loss_without_the_worst_units(case):
    scores, curves = scored(case, L2())
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    found = DamageCalibration().calibrate(curves, scores, case.graph, case.model, case.task)
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())
    for hand, name in case.names.items():
        dense = loss_without(case, hand, [])
        assert found.dense_loss == pytest.approx(dense, rel=1e-6)
        points = found.measured[name]
        assert [width for width, _ in points] == list(
            dict.fromkeys(round(share * len(scores[name])) for share in (0.5, 0.75, 0.25))
        )
        for width, increase in points:
            gone = np.setdiff1d(np.arange(len(scores[name])), best_units(scores[name], width))
            assert increase == pytest.approx(loss_without(case, hand, gone) - dense, abs=1e-6)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_what_lies_before_a_group_is_computed_once_and_losses_are_those_of_the_model_itself(
    case, monkeypatch, batch_statistics
):
    scores, curves = scored(case, L2())
    settings = DamageCalibration(batch_statistics=batch_statistics)

    def calibrated():
        with FlopCounterMode(display=False) as counter:
            found = settings.calibrate(curves, scores, case.graph, case.model, case.task)
        return found, counter.get_total_flops()

    once, least = calibrated()
    monkeypatch.setattr(calibration, "_program", lambda *given: None)
    again, all_of_it = calibrated()
    assert (once.dense_loss, once.measured) == (again.dense_loss, again.measured)
    assert all(np.array_equal(curve, again.curves[name]) for name, curve in once.curves.items())
    assert least < 0.9 * all_of_it


def test_batches_of_another_shape_than_the_traced_one_are_measured_all_the_same(small_case):
    large = [
        (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), targets[:4])
        for _, targets in small_case.task.objectives[0].train
    ]
    task = Task.single(train=large, validation=large, loss=cross_entropy, metric=lambda outputs, targets: 0.0)
    scores, curves = scored(small_case, L2())
    found = DamageCalibration().calibrate(curves, scores, small_case.graph, small_case.model, task)
    with torch.no_grad():
        losses = [float(cross_entropy(small_case.model.eval()(inputs), targets)) for inputs, targets in large]
    small_case.model.train()
    assert found.dense_loss == pytest.approx(np.mean(losses[:4]), rel=1e-6)


def test_curves_go_through_what_was_measured_and_keep_the_order_of_widths(case):
    scores, curves = scored(case, L2())
    found = DamageCalibration().calibrate(curves, scores, case.graph, case.model, case.task)
    for name, curve in found.curves.items():
        assert curve[-1] == 0
        assert (np.diff(curve)[np.diff(curves[name]) < 0] < 0).all()
        points = sorted(found.measured[name], reverse=True)
        highest = np.maximum.accumulate([0.0, *(increase for _, increase in points)])[1:]
        for (width, _), expected in zip(points, highest, strict=True):
            # The slope that keeps harmless removals from being free adds little.
            assert expected <= curve[width] <= expected + 0.01 * max(1.0, curves[name][width])
        narrowest = points[-1][0]
        if highest[-1] > 0.01 and narrowest > 1:
            ratio = curves[name][1] / curves[name][narrowest]
            assert curve[1] == pytest.approx(ratio * curve[narrowest], rel=1e-6)


def test_two_runs_agree_and_progress_is_told(small_case):
    scores, curves = scored(small_case, L1())
    steps = []
    calibration = DamageCalibration(kept=(0.5,), batches=1)
    first, second = (
        calibration.calibrate(
            curves,
            scores,
            small_case.graph,
            small_case.model,
            small_case.task,
            progress=lambda done, total: steps.append((done, total)),
        )
        for _ in range(2)
    )
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2
    assert all(np.array_equal(first.curves[name], second.curves[name]) for name in curves)
    assert first.measured == second.measured


def test_a_loader_that_shuffles_is_read_once(small_case):
    """Losses can only be subtracted where they are of the same samples."""
    objective = small_case.task.objectives[0]

    class Shuffling:
        read = 0

        def __iter__(self):
            self.read += 1
            for inputs, targets in objective.train:
                yield inputs + self.read, targets

    loader = Shuffling()
    scores, curves = scored(small_case, L1())
    found, expected = (
        DamageCalibration().calibrate(
            curves,
            scores,
            small_case.graph,
            small_case.model,
            Task.single(train=train, validation=objective.validation, loss=cross_entropy, metric=objective.metric),
        )
        for train in (loader, [(inputs + 1, targets) for inputs, targets in objective.train])
    )
    assert loader.read == 1
    assert found.measured == expected.measured


def test_when_time_is_up_the_rest_gets_the_scale_of_the_others(small_case, caplog):
    scores, curves = scored(small_case, L1())
    arguments = (curves, scores, small_case.graph, small_case.model, small_case.task)
    nothing = DamageCalibration(seconds=0.0).calibrate(*arguments)
    assert not any(nothing.measured.values())
    assert "calibrated at 0 of 12 widths in 0.0 s" in caplog.text
    assert all(np.array_equal(nothing.curves[name], curves[name]) for name in curves)


class Product(nn.Module):
    """Queries and keys meet in a product without weights: no layer reads their units."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(9, 4)

    def forward(self, x):
        return self.head((self.query(x) * self.key(x)).sum(-1))


def test_what_no_layer_reads_is_closed_where_it_is_made():
    torch.manual_seed(0)
    model = Product()
    data = [(torch.randn(6, 9, 5), torch.randint(0, 4, (6,)))]
    task = Task.single(train=data, validation=data, loss=cross_entropy, metric=lambda outputs, targets: 0.0)
    graph = trace(model, torch.zeros(2, 9, 5))
    scores = L2().score(graph, model)
    ((name, values),) = scores.items()
    found = DamageCalibration(kept=(0.5,)).calibrate(damage_curves(scores, "log_share"), scores, graph, model, task)
    ((width, increase),) = found.measured[name]
    gates = torch.zeros(4)
    gates[list(best_units(values, width))] = 1.0
    ((inputs, targets),) = data
    with torch.no_grad():
        dense = cross_entropy(model(inputs), targets)
        model.query.register_forward_hook(lambda module, given, made: made * gates)
        expected = cross_entropy(model(inputs), targets) - dense
    assert increase == pytest.approx(float(expected), abs=1e-6)


def test_groups_of_a_graph_that_are_not_asked_for_stay_out(small_case):
    name = small_case.names["inner"]
    scores = L2().score(small_case.graph, small_case.model, groups=[name])
    curves = damage_curves(scores, "log_share")
    found = DamageCalibration().calibrate(curves, scores, small_case.graph, small_case.model, small_case.task)
    assert list(found.curves) == list(found.measured) == [name]


def test_what_cannot_be_calibrated_is_refused(small_case):
    scores, curves = scored(small_case, L2())
    with pytest.raises(TaskError, match="damage must have a task to be calibrated") as caught:
        DamageCalibration().calibrate(curves, scores, small_case.graph, small_case.model, None)
    assert caught.value.hint
    for shares in ((), (1.0,), (0.5, -0.1)):
        with pytest.raises(ConfigError, match=r"kept shares must lie in \[0, 1\)"):
            DamageCalibration(kept=shares)
    with pytest.raises(ConfigError, match="at least 1 batch, found batches=0"):
        DamageCalibration(batches=0)


class Digits(nn.Module):
    """A stem, a residual block, a stride and a hidden layer for 8x8 images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(12, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
        )
        self.down = nn.Sequential(nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.hidden, self.head = nn.Linear(24, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.block(x)).relu()
        return self.head(self.hidden(self.down(x).mean((2, 3))).relu())


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(6):
        for rows in torch.randperm(1200).split(48):
            optimizer.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()
    data = [(images[rows], labels[rows]) for rows in torch.arange(400).split(100)]
    task = Task.single(train=data, validation=data, loss=cross_entropy, metric=lambda outputs, targets: 0.0)
    held_out = images[1200:], labels[1200:]
    assert float((model(held_out[0]).argmax(1) == held_out[1]).float().mean()) > 0.85
    return model, trace(model, images[:2]), task, held_out


@pytest.mark.parametrize("criterion", [L1(), L2(), Random()], ids=lambda criterion: criterion.name)
def test_calibrated_damage_ranks_real_plans_at_least_as_well(trained, criterion):
    """Plans of random widths, really cut, by their loss on images that nothing else has seen.

    No narrower than four fifths: below, without any recovery, most plans are no better than chance.
    """
    model, graph, task, (images, labels) = trained
    scores = criterion.score(graph, model)
    curves = damage_curves(scores, criterion.normalization)
    calibrated = DamageCalibration().calibrate(curves, scores, graph, model, task).curves
    random = np.random.default_rng(0)
    plain, scaled, real = [], [], []
    for _ in range(32):
        widths = {
            name: int(random.integers(int(0.8 * len(values)), len(values) + 1)) for name, values in scores.items()
        }
        kept = {name: best_units(values, widths[name]) for name, values in scores.items()}
        pruned = apply(model, make_plan(graph, kept, allow_empty=True)).eval()
        with torch.no_grad():
            real.append(float(cross_entropy(pruned(images), labels)))
        plain.append(sum(curves[name][width] for name, width in widths.items()))
        scaled.append(sum(calibrated[name][width] for name, width in widths.items()))
    before, after = spearmanr(plain, real).statistic, spearmanr(scaled, real).statistic
    assert after >= before
    assert after > 0.5


def test_batches_without_labels_do_not_make_an_objective_harmless(case):
    scores, curves = scored(case, L2())
    lead = case.task.objectives[0]
    every = list(lead.train)
    late = replace(
        lead, train=[*[(inputs, None) for inputs, _ in every], *every], labeled=lambda targets: targets is not None
    )
    usual, found = (
        DamageCalibration(batches=len(every)).calibrate(curves, scores, case.graph, case.model, Task((one,)))
        for one in (lead, late)
    )
    assert found.dense_loss == usual.dense_loss > 0
    assert found.measured == usual.measured
