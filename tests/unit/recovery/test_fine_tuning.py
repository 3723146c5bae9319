import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from edgeprune.errors import ConfigError, TaskError
from edgeprune.recovery.distillation.logits import Logits
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.tasks.task import Objective, Task


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_digits_are_learned(task, small_net, optimizer):
    model = small_net()
    told = []
    record = fine_tune(
        model,
        task,
        epochs=3,
        lr={"adamw": 5e-3, "sgd": 5e-2}[optimizer],
        optimizer=optimizer,
        progress=lambda *step: told.append(step),
    )
    assert record.before["accuracy"] < 0.3
    assert record.after["accuracy"] > 0.8
    assert record.after == evaluate(model, task)
    assert len(record.details["epochs"]) == 3
    assert record.details["kept_epoch"] == 3
    assert told[-1] == ("fine-tuning", 60, 60)
    assert model.training


def test_the_same_seed_gives_the_same_weights_and_moves_nobody_elses_generator(task, small_net):
    models = [small_net() for _ in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for model, seed in zip(models, (1, 1, 2), strict=True):
        fine_tune(model, task, steps=10, lr=5e-3, seed=seed)
    assert torch.equal(torch.rand(3), expected)
    assert equal(weights(models[0]), weights(models[1]))
    assert not equal(weights(models[0]), weights(models[2]))


def test_steps_cut_the_last_epoch_short(task, small_net):
    record = fine_tune(small_net(), task, epochs=5, steps=27)
    assert record.details["steps"] == 27
    assert len(record.details["epochs"]) == 2


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"steps": 0}])
def test_no_steps_change_nothing(task, small_net, changes):
    model = small_net()
    before = weights(model)
    record = fine_tune(model, task, **changes)
    assert equal(before, weights(model))
    assert record.before == record.after


def interrupted_at(step, model, task):
    def stop(_, done, total):
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, task, FineTuning(epochs=3, lr=5e-3), progress=stop)
    return model


def test_an_interrupt_leaves_the_last_finished_epoch(task, small_net):
    early, late = interrupted_at(21, small_net(), task), interrupted_at(39, small_net(), task)
    assert equal(weights(early), weights(late))
    assert evaluate(late, task)["accuracy"] > 0.4
    assert late.training
    assert all(parameter.grad is None for parameter in late.parameters())
    assert equal(weights(interrupted_at(19, small_net(), task)), weights(small_net()))


def test_the_best_epoch_is_kept_only_when_asked(task, small_net):
    start = small_net()
    fine_tune(start, task, epochs=2, lr=5e-3)
    # A rate that wrecks the model: the first state is the best, the last is not.
    wrecked, kept = copy.deepcopy(start), copy.deepcopy(start)
    last = fine_tune(wrecked, task, epochs=1, lr=3.0, optimizer="sgd", max_gradient_norm=None, momentum=0.0)
    best = fine_tune(
        kept, task, epochs=1, lr=3.0, optimizer="sgd", max_gradient_norm=None, momentum=0.0, select_best=True
    )
    assert last.after["accuracy"] < last.before["accuracy"]
    assert best.after == best.before
    assert best.details["kept_epoch"] == 0
    assert equal(weights(kept), weights(start))


def test_a_teacher_alone_teaches(task, small_net):
    teacher, student = small_net(), small_net()
    fine_tune(teacher, task, epochs=3, lr=5e-3)
    for parameter in student.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=torch.Generator().manual_seed(3))
    before = weights(teacher)
    record = fine_tune(student, task, epochs=3, lr=1e-2, teacher=teacher, distillation_weight=1.0)
    assert record.after["accuracy"] > 0.75
    assert equal(before, weights(teacher))
    assert teacher.training


def test_several_objectives_are_trained_together(digits, task, small_net):
    train, validation = digits
    odd = Objective(
        "odd",
        DataLoader(train, batch_size=400),
        DataLoader(validation, batch_size=400),
        lambda outputs, targets: nn.functional.cross_entropy(
            torch.stack([outputs[:, 0::2].logsumexp(1), outputs[:, 1::2].logsumexp(1)], 1), targets % 2
        ),
        lambda outputs, targets: float((outputs.argmax(1) % 2 == targets % 2).float().mean()),
        weight=0.5,
    )
    record = fine_tune(small_net(), Task((task.objectives[0], odd)), epochs=2, lr=5e-3)
    assert set(record.after) == {"accuracy", "odd"}
    assert record.after["odd"] > record.before["odd"]
    assert record.details["steps"] == 40


def test_frozen_parameters_stay(task, small_net):
    model = small_net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    fine_tune(model, task, steps=5)
    assert torch.equal(before, model[0].weight)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TaskError, match="parameters that require gradients, found none"):
        fine_tune(model, task, steps=5)


def test_a_loss_that_becomes_nan_is_refused_and_the_weights_are_kept(task, small_net):
    model = small_net()
    before = weights(model)
    count = []

    def loss(outputs, targets):
        count.append(1)
        return nn.functional.cross_entropy(outputs, targets) * (float("nan") if len(count) == 5 else 1.0)

    broken = Task.single(
        train=task.objectives[0].train,
        validation=task.objectives[0].validation,
        loss=loss,
        metric=task.objectives[0].metric,
    )
    with pytest.raises(TaskError, match="loss of objective 'accuracy' must be finite, found nan"):
        fine_tune(model, broken, epochs=1)
    assert equal(before, weights(model))


def test_an_empty_loader_is_refused(task, small_net):
    empty = Task.single(
        train=[], validation=task.objectives[0].validation, loss=nn.CrossEntropyLoss(), metric=task.objectives[0].metric
    )
    with pytest.raises(TaskError, match="train data of objective 'accuracy' must yield at least one batch"):
        fine_tune(small_net(), empty)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "learning rate must be above 0, found 0.0"),
        ({"lr": float("nan")}, "learning rate must be above 0, found nan"),
        ({"optimizer": "adam"}, "optimizer must be 'adamw' or 'sgd', found 'adam'"),
        ({"epochs": -1}, "epochs and steps must be at least 0, found -1"),
        ({"distillation_weight": 1.5}, r"distillation_weight must lie in \[0, 1\], found 1.5"),
        ({"epoch": 3}, "settings of fine-tuning must be among epochs, .* found epoch"),
    ],
)
def test_settings_that_cannot_be_used_are_named(task, small_net, changes, message):
    with pytest.raises(ConfigError, match=message):
        fine_tune(small_net(), task, **changes)


def test_distillation_equals_the_divergence_by_hand():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    loss = Logits(2.0).loss(student, teacher)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    torch.testing.assert_close(loss, 4 * (p * (p / q).log()).sum(1).mean())
    assert Logits().loss(student, student).item() == pytest.approx(0.0, abs=1e-6)


def test_distillation_needs_class_scores():
    with pytest.raises(TaskError, match=r"outputs of shape \(batch, classes, ...\), found shape \(5,\)"):
        Logits().loss(torch.zeros(5), torch.zeros(5))
    with pytest.raises(TaskError, match="found dict"):
        Logits().loss({}, {})
    with pytest.raises(TaskError, match=r"outputs of one shape, found \(5, 3\) and \(5, 4\)"):
        Logits().loss(torch.zeros(5, 3), torch.zeros(5, 4))
    with pytest.raises(ConfigError, match="temperature must be above 0, found 0"):
        Logits(0)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 1)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        hidden = self.trunk(inputs).relu()
        return {"first": self.first(hidden), "second": self.second(hidden)}


def heads(first, second, labeled=None, weight=1.0):
    """Two objectives on what a batch holds for each."""

    def loss(name):
        return lambda outputs, targets: nn.functional.mse_loss(outputs[name], targets[name])

    def metric(name):
        return lambda outputs, targets: float(nn.functional.mse_loss(outputs[name], targets[name]))

    return Task(
        (
            Objective("first", first, first, loss("first"), metric("first"), False),
            Objective(
                "second", second, second, loss("second"), metric("second"), False, labeled=labeled, weight=weight
            ),
        )
    )


def batches(count=6, size=5):
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 4, generator=generator),
            {"first": torch.randn(size, 2, generator=generator), "second": torch.randn(size, 1, generator=generator)},
        )
        for _ in range(count)
    ]


def test_one_loader_with_several_targets_is_one_forward_per_step():
    together, apart = TwoHeads(), TwoHeads()
    shared = batches()
    settings = {"epochs": 2, "lr": 1e-2, "max_gradient_norm": None, "optimizer": "sgd"}
    one = fine_tune(together, heads(shared, shared, weight=0.3), **settings)
    two = fine_tune(apart, heads(batches(), batches(), weight=0.3), **settings)
    for name, value in together.state_dict().items():
        torch.testing.assert_close(value, apart.state_dict()[name], rtol=1e-5, atol=1e-7)
    assert one.after == pytest.approx(two.after, rel=1e-5)
    # 6 batches: 2 epochs of training, 3 evaluations.
    assert (together.calls, apart.calls) == (6 * 5, 2 * 6 * 5)


def test_loaders_of_other_lengths_go_round():
    short, long = batches(2), batches(8)
    record = fine_tune(TwoHeads(), heads(batches(6), short), epochs=2, lr=1e-2)
    assert record.details["steps"] == 12
    assert record.after["second"] < record.before["second"]
    assert fine_tune(TwoHeads(), heads(batches(6), long), epochs=2, lr=1e-2).details["steps"] == 12


def test_samples_without_labels_teach_nothing():
    """Targets of samples without labels may be anything: the same weights come out."""

    def spoiled(value):
        found = batches()
        for number, (_, targets) in enumerate(found):
            targets["there"] = torch.arange(5) % 2 == 0 if number else torch.zeros(5, dtype=torch.bool)
            targets["second"][~targets["there"]] = value
        return found

    found = []
    for value in (0.0, float("nan")):
        model, shared = TwoHeads(), spoiled(value)
        record = fine_tune(model, heads(shared, shared, lambda targets: targets["there"]), epochs=2, lr=1e-2)
        found.append((weights(model), record.after))
    assert equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
